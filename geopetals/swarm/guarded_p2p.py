"""hivemind's P2P with a p2pd that dies with this process, and streams that are closed when they cannot be opened."""

import asyncio
import os
import sys
from typing import Any

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from geopetals.swarm import orphan_guard

_STOP_TIMEOUT_S = 3.0


class GuardedP2P(P2P):  # type: ignore[misc]
    """hivemind's P2P, with a p2pd that dies with this process."""

    _started: "list[GuardedP2P]"
    _flags: list[str]

    def __init__(self) -> None:
        super().__init__()
        self._started.append(self)

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
        await self._client.connect(peer_id_of(peer), [Multiaddr(where)])

    async def wait_daemon(self) -> int:
        """Wait until p2pd ends, however it ends; returns its exit code."""
        code: int = await self._child.wait()
        return code


def peer_id_of(text: str) -> PeerID:
    return PeerID.from_base58(text)
