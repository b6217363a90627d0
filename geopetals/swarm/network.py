"""One process' place in a swarm: its p2pd daemon, its libp2p identity and its DHT node, all on one event loop."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from google.protobuf.message import DecodeError
from hivemind.dht import DHTNode
from hivemind.dht.validation import RecordValidatorBase
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.proto import crypto_pb2

from geopetals.errors import NetworkError
from geopetals.swarm import circuits
from geopetals.swarm.address_book import AddressBook, keep_announced
from geopetals.swarm.first_contact import meet_any
from geopetals.swarm.guarded_p2p import GuardedP2P as GuardedP2P
from geopetals.swarm.guarded_p2p import peer_id_of as peer_id_of
from geopetals.swarm.p2pd_options import RelayLimits, p2p_options, p2pd_flags
from geopetals.swarm.p2pd_options import is_loopback as is_loopback
from geopetals.swarm.private_folders import make_private_folder, sweep_stale_folders

_DHT_WORKERS = 8
_STOP_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """How to stand in the network.

    `port` 0 takes a free one; `public_ip` is announced instead of `host`; `identity` is a key as `new_identity()` makes
    it, None for one that lives as long as this network. `relays` are the addresses of relays for a peer behind NAT that
    is reached through them, `spare_relays` of those that did not answer; `relay_limits` makes it a relay itself.
    `metrics_port`, on loopback, is where p2pd tells what it knows of its reachability, 0 any free one. `validator`
    decides which DHT records are stored and read.
    """

    initial_peers: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    public_ip: str | None = None
    identity: bytes | None = None
    client_only: bool = False
    relays: tuple[str, ...] = ()
    spare_relays: tuple[str, ...] = ()
    relay_limits: RelayLimits | None = None
    metrics_port: int | None = None
    validator: RecordValidatorBase | None = None


class Network:
    """A started p2pd with a DHT node. Everything runs on the event loop that called `start()`."""

    def __init__(self, config: NetworkConfig, p2p: GuardedP2P, node: DHTNode, folder: Path) -> None:
        self.config = config
        """As asked for, with the ports that were taken."""
        self.p2p, self.node = p2p, node
        self._folder = folder
        self._book = p2p.book = AddressBook(p2p, node, config.initial_peers)
        self._tasks = [asyncio.create_task(circuits.watch(p2p))]
        if not config.client_only:
            self._tasks.append(asyncio.create_task(keep_announced(node, self.addresses)))

    @classmethod
    async def start(cls, config: NetworkConfig) -> "Network":
        """Raises NetworkError when the address cannot be bound or no initial peer answers."""
        sweep_stale_folders()
        config = _with_fixed_ports(config)
        with _room():
            folder = make_private_folder()
        try:
            with _room():
                p2p = await _start_daemon(config, folder)
                node = await _start_dht(config, p2p)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(replace(config, port=await _listening_port(config, p2p)), p2p, node, folder)

    @property
    def peer_id(self) -> str:
        name: str = self.p2p.peer_id.to_base58()
        return name

    @property
    def is_relayed(self) -> bool:
        """Whether others reach this process through relays, unless holes can be punched."""
        return bool(self.config.relays)

    async def addresses(self) -> tuple[str, ...]:
        """Addresses at which others reach this process, with its peer id; of a relayed one those at its relays now."""
        found = await self.p2p.addresses()
        if self.is_relayed:
            return tuple(address for address in found if circuits.CIRCUIT in address)
        return tuple(sorted(found, key=lambda address: is_loopback(address.split("/")[2])))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._book.close()
        self.node.is_alive = False
        if self.p2p.is_running:  # a dead daemon never answers that it has forgotten our handlers
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await self.node.shutdown()
        await self.p2p.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def lone_p2pd(config: NetworkConfig) -> AsyncIterator[GuardedP2P]:
    """A p2pd without a DHT node, for as long as the context is open. Raises as `Network.start` does."""
    config = _with_fixed_ports(config)
    with _room():
        folder = make_private_folder()
    try:
        with _room():
            p2p = await _start_daemon(config, folder)
        try:
            yield p2p
        finally:
            await p2p.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _start_daemon(config: NetworkConfig, folder: Path) -> GuardedP2P:
    # The folder is private to this user: whoever can open p2pd's control socket can speak in our name.
    started: list[GuardedP2P] = []
    members = {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/", "_started": started, "_flags": p2pd_flags(config)}
    daemon_class: Any = type("GuardedP2P", (GuardedP2P,), members)
    identity = folder / "identity"
    with os.fdopen(os.open(identity, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(config.identity or new_identity())
    try:
        p2p: GuardedP2P = await daemon_class.create(identity_path=str(identity), **p2p_options(config))
        if config.initial_peers and not await meet_any(p2p, config.initial_peers):
            raise _unreachable(config)
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
            client_mode=config.client_only or bool(config.relays),
            num_workers=_DHT_WORKERS,
            record_validator=config.validator,
        )
    except BaseException as error:
        await p2p.stop()
        if isinstance(error, Exception):
            raise _unreachable(config) from error
        raise


def _with_fixed_ports(config: NetworkConfig) -> NetworkConfig:
    """Bind once to learn whether the address is free; an announced address needs a definite port before p2pd starts."""
    if config.metrics_port == 0:
        config = replace(config, metrics_port=_bound_port("127.0.0.1", 0))
    if config.client_only:
        return config
    host = "127.0.0.1" if config.host == "localhost" else config.host
    try:
        port = _bound_port(host, config.port)
    except OSError as error:
        raise NetworkError(_bind_failure(config, error)) from error
    return replace(config, host=host, port=port if config.public_ip is not None or config.relays else config.port)


async def _listening_port(config: NetworkConfig, p2p: GuardedP2P) -> int:
    if config.port or config.client_only:
        return config.port
    (address, *_) = await p2p.get_visible_maddrs()
    return int(address["tcp"])


def _bound_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        bound: int = probe.getsockname()[1]
        return bound


def _bind_failure(config: NetworkConfig, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"cannot listen on {config.host} port {config.port} ({reason}): choose another --port or --host."


def _explain(error: Exception, config: NetworkConfig) -> NetworkError:
    text = str(error)
    if "address already in use" in text or "failed to listen" in text:
        return NetworkError(_bind_failure(config, OSError("the address is already in use")))
    return NetworkError(f"p2pd did not start: {text.rstrip('.')}.")


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = tempfile.gettempdir()
        raise NetworkError(f"cannot write to {where} ({reason}): free some space there, or set TMPDIR.") from error


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
