"""Lets stock PETALS 2.2.0.post1 be imported beside hivemind 1.1.12; to be called before `import petals`.

PETALS itself is not changed. It takes from the top of `hivemind` what this version keeps in submodules only.
"""

import importlib
import os

_NAMES = {
    "hivemind.compression": ("deserialize_tensor_stream", "deserialize_torch_tensor", "serialize_torch_tensor"),
    "hivemind.p2p": ("P2P", "P2PContext", "PeerID"),
    "hivemind.utils.asyncio": ("anext",),
    "hivemind.utils.logging": ("get_logger",),
    "hivemind.utils.nested": ("nested_compare", "nested_flatten", "nested_pack"),
    "hivemind.utils.serializer": ("MSGPackSerializer",),
    "hivemind.utils.tensor_descr": ("BatchTensorDescriptor", "TensorDescriptor"),
    "hivemind.utils.timed_storage": ("MAX_DHT_TIME_DISCREPANCY_SECONDS", "TimedStorage", "get_dht_time"),
}


def lend_hivemind_names() -> None:
    os.environ.setdefault("PETALS_IGNORE_DEPENDENCY_VERSION", "1")
    hivemind = importlib.import_module("hivemind")
    for source, names in _NAMES.items():
        module = importlib.import_module(source)
        for name in names:
            setattr(hivemind, name, getattr(module, name))


def keep_sockets_in(folder: str) -> None:
    """Where p2pd's control sockets go instead of /tmp, where those of a killed process would stay for ever."""
    importlib.import_module("hivemind.p2p.p2p_daemon").P2P._UNIX_SOCKET_PREFIX = f"/unix{folder}/"
