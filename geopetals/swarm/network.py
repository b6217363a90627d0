"""One process' place in a swarm: its p2pd daemon, its libp2p identity and its DHT node, all on one event loop."""

import asyncio
import contextlib
import ipaddress
import os
import re
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from google.protobuf.message import DecodeError
from hivemind.dht import DHTNode
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import crypto_pb2, p2pd_pb2

from geopetals.errors import NetworkError
from geopetals.swarm import orphan_guard
from geopetals.swarm.private_folders import make_private_folder, sweep_stale_folders

STARTUP_TIMEOUT_S = 30.0
_DHT_WORKERS = 8
_STOP_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """How to stand in the network.

    `port` 0 takes a free one; `public_ip` is announced instead of `host`; `identity` is a key as `new_identity()` makes
    it, None for one that lives as long as this network.
    """

    initial_peers: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    public_ip: str | None = None
    identity: bytes | None = None
    client_only: bool = False


class GuardedP2P(P2P):  # type: ignore[misc]
    """hivemind's P2P, with a p2pd that dies with this process."""

    _started: "list[GuardedP2P]"

    def __init__(self) -> None:
        super().__init__()
        self._started.append(self)

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        guard = [sys.executable, "-I", "-S", orphan_guard.__file__, str(os.getpid())]
        return [*guard, *P2P._make_process_args(*args, **kwargs)]

    @property
    def daemon_pid(self) -> int:
        pid: int = self._child.pid
        return pid

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.returncode is None

    async def stop(self) -> None:
        """End p2pd: by SIGTERM, and by SIGKILL if it does not follow."""
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self.shutdown()
        except TimeoutError:
            self._child.kill()
            await self._child.wait()

    async def call_binary_stream_handler(
        self, peer_id: PeerID, handler_name: str
    ) -> tuple[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter]:
        """hivemind's, but a stream that cannot be opened, or whose opening is cancelled, is closed again."""
        reader, writer = await self._client.control.daemon_connector.open_connection()
        try:
            opening = p2pd_pb2.StreamOpenRequest(peer=peer_id.to_bytes(), proto=[handler_name])
            request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=opening)
            await write_pbmsg(writer, request)
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            raise_if_failed(response)
        except BaseException:
            writer.close()
            raise
        return StreamInfo.from_protobuf(response.streamInfo), reader, writer

    async def wait_daemon(self) -> int:
        """Wait until p2pd ends, however it ends; returns its exit code."""
        code: int = await self._child.wait()
        return code


class Network:
    """A started p2pd with a DHT node. Everything runs on the event loop that called `start()`."""

    def __init__(self, p2p: GuardedP2P, node: DHTNode, folder: Path) -> None:
        self.p2p, self.node = p2p, node
        self._folder = folder

    @classmethod
    async def start(cls, config: NetworkConfig) -> "Network":
        """Raises NetworkError when the address cannot be bound or no initial peer answers."""
        sweep_stale_folders()
        config = _with_fixed_port(config)
        try:
            folder = make_private_folder()
        except OSError as error:
            raise _no_room(error) from error
        try:
            p2p = await _start_daemon(config, folder)
            node = await _start_dht(config, p2p)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise _no_room(error) from error
            raise
        return cls(p2p, node, folder)

    @property
    def peer_id(self) -> str:
        name: str = self.p2p.peer_id.to_base58()
        return name

    async def addresses(self) -> tuple[str, ...]:
        """Addresses at which others reach this process, with its peer id."""
        return tuple(str(address) for address in await self.p2p.get_visible_maddrs())

    async def stop(self) -> None:
        self.node.is_alive = False
        if self.p2p.is_running:  # a dead daemon never answers that it has forgotten our handlers
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await self.node.shutdown()
        await self.p2p.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


async def _start_daemon(config: NetworkConfig, folder: Path) -> GuardedP2P:
    # The folder is private to this user: whoever can open p2pd's control socket can speak in our name.
    started: list[GuardedP2P] = []
    members = {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/", "_started": started}
    daemon_class: Any = type("GuardedP2P", (GuardedP2P,), members)
    identity = folder / "identity"
    with os.fdopen(os.open(identity, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(config.identity or new_identity())
    try:
        p2p: GuardedP2P = await daemon_class.create(identity_path=str(identity), **_p2p_options(config))
    except BaseException as error:
        for failed in started:  # hivemind leaves a p2pd that reports a failure to itself
            await failed.stop()
        if isinstance(error, P2PDaemonError | ValueError):
            raise _explain(error, config) from error
        raise
    return p2p


async def _start_dht(config: NetworkConfig, p2p: GuardedP2P) -> DHTNode:
    try:
        return await DHTNode.create(
            p2p=p2p,
            initial_peers=list(config.initial_peers) or None,
            client_mode=config.client_only,
            num_workers=_DHT_WORKERS,
        )
    except BaseException as error:
        await p2p.stop()
        if isinstance(error, Exception):
            raise _unreachable(config) from error
        raise


def peer_id_of(text: str) -> PeerID:
    return PeerID.from_base58(text)


def _p2p_options(config: NetworkConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "initial_peers": list(config.initial_peers) or None,
        "use_relay": False,
        "use_auto_relay": False,
        "auto_nat": False,
        "nat_port_map": False,
        "check_if_identity_free": False,
        "startup_timeout": STARTUP_TIMEOUT_S,
    }
    if config.client_only:
        return options | {"dht_mode": "client", "no_listen": True, "host_maddrs": None}
    options["host_maddrs"] = [_maddr(config.host, config.port)]
    if config.public_ip is not None:
        options["announce_maddrs"] = [_maddr(config.public_ip, config.port)]
    return options


def _maddr(host: str, port: int) -> str:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return f"/dns/{host}/tcp/{port}"
    return f"/ip{version if version == 6 else 4}/{host}/tcp/{port}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _with_fixed_port(config: NetworkConfig) -> NetworkConfig:
    """Bind once to learn whether the address is free; an announced address needs a definite port before p2pd starts."""
    if config.client_only:
        return config
    host = "127.0.0.1" if config.host == "localhost" else config.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, config.port))
        except OSError as error:
            raise NetworkError(_bind_failure(config, error)) from error
        port = probe.getsockname()[1] if config.public_ip is not None else config.port
    return replace(config, host=host, port=port)


def _bind_failure(config: NetworkConfig, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"cannot listen on {config.host} port {config.port} ({reason}): choose another --port or --host."


def _explain(error: Exception, config: NetworkConfig) -> NetworkError:
    text = str(error)
    if "address already in use" in text or "failed to listen" in text:
        return NetworkError(_bind_failure(config, OSError("the address is already in use")))
    if config.initial_peers:
        return _unreachable(config)
    return NetworkError(f"p2pd did not start: {text.rstrip('.')}.")


def _no_room(error: OSError) -> NetworkError:
    reason = error.strerror or str(error)
    return NetworkError(f"cannot write to {tempfile.gettempdir()} ({reason}): free some space there, or set TMPDIR.")


def _unreachable(config: NetworkConfig) -> NetworkError:
    peers = ", ".join(re.sub(r"/p2p/.*", "", peer) for peer in config.initial_peers[:3])
    return NetworkError(f"cannot reach the swarm at {peers}: is it running, and reachable from this machine?")


def new_identity() -> bytes:
    """An Ed25519 libp2p key. Its peer id contains the public key itself, so that records can be signed with it."""
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    message = crypto_pb2.PrivateKey(key_type=crypto_pb2.Ed25519, data=secret + public)
    data: bytes = message.SerializeToString()
    return data


def load_identity(path: Path) -> bytes:
    """The key in a file, which is made, readable by its owner alone, if there is none."""
    try:
        if path.exists():
            data = path.read_bytes()
            if not crypto_pb2.PrivateKey.FromString(data).data:
                raise DecodeError("the file holds no key")
            return data
        data = new_identity()
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        unfinished.rename(path)  # never half a key under its final name
        return data
    except OSError as error:
        raise NetworkError(f"cannot use the identity file {path} ({error.strerror}): choose another path.") from error
    except DecodeError as error:
        raise NetworkError(f"{path} is no identity file: choose another path, it is made if absent.") from error
