"""hivemind's P2P with a p2pd that dies with this process, streams that are closed when they cannot be opened, and a
book of addresses for peers that p2pd cannot find.
"""

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from geopetals.swarm import orphan_guard

if TYPE_CHECKING:
    from geopetals.swarm.address_book import AddressBook

_STOP_TIMEOUT_S = 3.0
_P2P = b"\xa5\x03"
"""The code of `p2p` in an address."""


class GuardedP2P(P2P):  # type: ignore[misc]
    """hivemind's P2P, with a p2pd that dies with this process."""

    _started: "list[GuardedP2P]"
    _flags: list[str]

    def __init__(self) -> None:
        super().__init__()
        self._started.append(self)
        self.book: AddressBook | None = None

    @classmethod
    def _make_process_args(cls, *args: Any, **kwargs: Any) -> list[str]:
        guard = [sys.executable, "-I", "-S", orphan_guard.__file__, str(os.getpid())]
        return [*guard, *P2P._make_process_args(*args, **kwargs), *cls._flags]

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
        try:
            return await self._open_stream(peer_id, handler_name)
        except P2PDaemonError as error:
            if self.book is None or not await self.book.reconnect(peer_id, error):
                raise
        return await self._open_stream(peer_id, handler_name)

    async def _call_unary_protobuf_handler(self, peer_id: PeerID, *call: Any) -> Any:
        try:
            return await super()._call_unary_protobuf_handler(peer_id, *call)
        except P2PDaemonError as error:  # the call has not been sent
            if self.book is None or not await self.book.reconnect(peer_id, error):
                raise
        return await super()._call_unary_protobuf_handler(peer_id, *call)

    async def _open_stream(
        self, peer_id: PeerID, handler_name: str
    ) -> tuple[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter]:
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

    async def connect(self, address: str) -> None:
        """Dial `/ip4/.../p2p/<peer id>`, if there is no connection yet; as slow as the network is."""
        where, _, peer = address.rpartition("/p2p/")
        await self.dial(peer_id_of(peer), [where])

    async def dial(self, peer_id: PeerID, addresses: list[str]) -> None:
        """`addresses` do not end in the peer id."""
        peer = p2pd_pb2.ConnectRequest(peer=peer_id.to_bytes(), addrs=list(map(_encoded, addresses)))
        await self._ask_daemon(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=peer))

    async def addresses(self) -> list[str]:
        """Where others reach this p2pd as far as it knows now, with its peer id."""
        found = (await self._ask_daemon(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))).identify.addrs
        return [f"{Multiaddr(address)}/p2p/{self.peer_id.to_base58()}" for address in found]

    async def _ask_daemon(self, request: Any) -> Any:
        """As hivemind's client does, but one that is cancelled leaves nothing open."""
        reader, writer = await self._client.control.daemon_connector.open_connection()
        try:
            await write_pbmsg(writer, request)
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            raise_if_failed(response)
            return response
        finally:
            writer.close()

    async def wait_daemon(self) -> int:
        """Wait until p2pd ends, however it ends; returns its exit code."""
        code: int = await self._child.wait()
        return code


def _encoded(address: str) -> bytes:
    """In binary. hivemind's own way for peer ids in an address, of relays, is one that p2pd does not read."""
    before, *named = address.split("/p2p/")
    encoded: bytes = Multiaddr(before).to_bytes() if before else b""
    for part in named:
        peer, _, after = part.partition("/")
        name = peer_id_of(peer).to_bytes()
        encoded += _P2P + bytes([len(name)]) + name
        if after:
            encoded += Multiaddr(f"/{after}").to_bytes()
    return encoded


def peer_id_of(text: str) -> PeerID:
    return PeerID.from_base58(text)
