"""The one place that makes petals 2.2.0.post1 importable on today's stack, and the one place that imports it.

petals' metadata pins packages of 2023, its code needs little of them. Importing this module

* gives `hivemind` the names that petals takes from its top and that hivemind >= 1.1.12 keeps in submodules only,
* stands in for what petals imports and this project replaces (old model classes, tensor_parallel),
* mends one fault of hivemind's unary calls (see `_call_unary_handler`),
* mends one of its serializer, with which any peer could end any process (see `_limit_nesting`),
* keeps the program's logging as it was (see `_keep_logging`).

Nothing else patches anything. What GeoPETALS uses of petals is re-exported below.
"""

import asyncio
import importlib
import importlib.metadata
import logging
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from geopetals.errors import StackError

PETALS_VERSION = "2.2.0.post1"
INSTALL_PETALS = f"pip install --no-deps petals=={PETALS_VERSION}"

_HIVEMIND_NAMES = {
    "PeerID": "hivemind.p2p",
    "P2P": "hivemind.p2p",
    "P2PContext": "hivemind.p2p",
    "MSGPackSerializer": "hivemind.utils.serializer",
    "BatchTensorDescriptor": "hivemind.utils.tensor_descr",
    "TensorDescriptor": "hivemind.utils.tensor_descr",
    "MAX_DHT_TIME_DISCREPANCY_SECONDS": "hivemind.utils.timed_storage",
    "get_dht_time": "hivemind.utils.timed_storage",
    "TimedStorage": "hivemind.utils.timed_storage",
    "get_logger": "hivemind.utils.logging",
    "anext": "hivemind.utils.asyncio",
    "nested_flatten": "hivemind.utils.nested",
    "nested_compare": "hivemind.utils.nested",
    "nested_pack": "hivemind.utils.nested",
    "serialize_torch_tensor": "hivemind.compression",
    "deserialize_torch_tensor": "hivemind.compression",
    "deserialize_tensor_stream": "hivemind.compression",
}
_HIVEMIND_UTILS_NAMES = {
    "DHTExpiration": "hivemind.utils.timed_storage",
    "MPFuture": "hivemind.utils.mpfuture",
    "get_dht_time": "hivemind.utils.timed_storage",
    "get_logger": "hivemind.utils.logging",
    "TensorDescriptor": "hivemind.utils.tensor_descr",
    "enter_asynchronously": "hivemind.utils.asyncio",
}


def check_petals() -> None:
    """Raise StackError with the command that mends it unless petals is installed in the one version we build on."""
    try:
        found = importlib.metadata.version("petals")
    except importlib.metadata.PackageNotFoundError:
        raise StackError(f"petals {PETALS_VERSION} is not installed: run `{INSTALL_PETALS}`.") from None
    if found != PETALS_VERSION:
        raise StackError(f"petals {found} is installed, but GeoPETALS needs {PETALS_VERSION}: run `{INSTALL_PETALS}`.")


def _lend_names(package: str, names: dict[str, str]) -> None:
    module = importlib.import_module(package)
    for name, source in names.items():
        if not hasattr(module, name):
            setattr(module, name, getattr(importlib.import_module(source), name))


def _stand_in(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def _stand_in_for_replaced_parts() -> None:
    def replaced(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this part of petals is replaced by geopetals.swarm.stage")

    _stand_in("petals.models", __all__=[], __path__=[])
    _stand_in("petals.server.from_pretrained", load_pretrained_block=replaced)
    if "tensor_parallel" not in sys.modules:
        only_a_name = type("TensorParallel", (), {})
        package = _stand_in("tensor_parallel", TensorParallel=only_a_name, __path__=[])
        vars(package)["tensor_parallel"] = _stand_in("tensor_parallel.tensor_parallel", PerDeviceTensors=only_a_name)
        vars(package)["slicing_configs"] = _stand_in("tensor_parallel.slicing_configs", get_bloom_config=replaced)


async def _call_unary_handler(self: Any, peer_id: Any, proto: str, data: bytes) -> bytes:
    """hivemind's `ControlClient.call_unary_handler` with the pending future kept out of reach of cancellation.

    In 1.1.12 a call that is cancelled while its answer is on the way leaves a cancelled future behind; set_result() on
    it ends the task that reads all answers, and every later unary call of the process waits for ever.
    """
    from hivemind.p2p.p2p_daemon_bindings import control

    call_id = uuid4()
    call = control.p2pd_pb.CallUnaryRequest(peer=peer_id.to_bytes(), proto=proto, data=data)
    request = control.p2pd_pb.PersistentConnectionRequest(callId=call_id.bytes, callUnary=call)
    if request.ByteSize() > self.persistent_conn_max_msg_size:
        raise control.P2PDaemonError(f"Message size exceeds set limit {self.persistent_conn_max_msg_size}")
    future = self._pending_calls[call_id] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.exception())
    try:
        await self._pending_messages.put(request)
        answer: bytes = await asyncio.shield(future)
        return answer
    except asyncio.CancelledError:
        await self._cancel_unary_call(call_id)
        raise
    finally:
        self._pending_calls.pop(call_id, None)


_MAX_NESTED_TUPLES = 24
_nesting = threading.local()


def _limit_nesting(serializer: Any) -> None:
    """Make hivemind's MSGPackSerializer refuse tuples within tuples within tuples.

    A tuple holds msgpack of its own and is decoded by recursion in C that takes 41 KiB of stack each time: in 1.1.12 a
    message, or a record in the DHT, of 200 tuples within each other (3 KB) ends the process with a segmentation fault.
    """
    unlimited = serializer._decode_ext_types

    def decode(cls: Any, type_code: int, data: bytes) -> Any:
        depth = getattr(_nesting, "depth", 0)
        if depth >= _MAX_NESTED_TUPLES:
            raise ValueError("tuples are nested too deeply")
        _nesting.depth = depth + 1
        try:
            return unlimited(type_code, data)
        finally:
            _nesting.depth = depth

    serializer._decode_ext_types = classmethod(decode)


def _keep_logging() -> Callable[[], None]:
    """Returns what to call after petals' imports: petals.utils.convert_block takes the root logger's handlers away, and
    with them the formatter that keeps join tokens out of logs, and puts hivemind's in their place.
    """
    from hivemind.utils.logging import use_hivemind_log_handler

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def restore() -> None:
        use_hivemind_log_handler("in_hivemind")
        root.setLevel(level)
        for handler in handlers:
            root.addHandler(handler)

    return restore


def _activate() -> None:
    check_petals()
    os.environ.setdefault("PETALS_IGNORE_DEPENDENCY_VERSION", "1")
    try:
        _lend_names("hivemind", _HIVEMIND_NAMES)
        _lend_names("hivemind.utils", _HIVEMIND_UTILS_NAMES)
    except ModuleNotFoundError as error:
        raise StackError(f"{error.name} is not installed: run `geopetals doctor` to see what is missing.") from error
    _stand_in_for_replaced_parts()
    from hivemind.p2p.p2p_daemon_bindings import control
    from hivemind.utils.serializer import MSGPackSerializer

    control.ControlClient.call_unary_handler = _call_unary_handler
    _limit_nesting(MSGPackSerializer)


_activate()
_restore_logging = _keep_logging()

from petals.data_structures import (  # noqa: E402
    CHAIN_DELIMITER,
    UID_DELIMITER,
    ModelInfo,
    RemoteModuleInfo,
    ServerInfo,
    ServerState,
)
from petals.server.block_selection import choose_best_blocks  # noqa: E402
from petals.utils.misc import DUMMY, DUMMY_INT64, is_dummy  # noqa: E402
from petals.utils.packaging import pack_args_kwargs, unpack_args_kwargs  # noqa: E402

_restore_logging()

__all__ = [
    "CHAIN_DELIMITER",
    "DUMMY",
    "DUMMY_INT64",
    "PETALS_VERSION",
    "UID_DELIMITER",
    "ModelInfo",
    "RemoteModuleInfo",
    "ServerInfo",
    "ServerState",
    "choose_best_blocks",
    "is_dummy",
    "pack_args_kwargs",
    "unpack_args_kwargs",
]
