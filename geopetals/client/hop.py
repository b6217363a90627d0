"""The client's end of one server's rpc_inference stream: control of its session, and what is not pushed."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import torch
from hivemind.p2p import P2P
from hivemind.proto import runtime_pb2

from geopetals.client.connection import UNREACHABLE, open_stream
from geopetals.client.dialect import Dialect, PetalsDialect, RingDialect
from geopetals.client.routing import Hop
from geopetals.errors import ServerBroken, SwarmFailure
from geopetals.swarm.heartbeat import CLIENT_BEAT_S, SERVER_SILENCE_S, Every, Silence
from geopetals.swarm.records import block_uids
from geopetals.swarm.ring_messages import (
    KEY,
    Beat,
    Link,
    Opening,
    Step,
    credential_shown,
    read_link,
    version_of,
)
from geopetals.swarm.stack import CHAIN_DELIMITER
from geopetals.swarm.wire import (
    WireError,
    close,
    deserialize,
    end_of_stream,
    frame,
    gone,
    read_message,
    read_metadata,
    short_peer,
    write_metadata,
)

_OPENING_SILENCE_S = 3.0
"""A server that sends heartbeats sends the first at once."""
_PING = frame(runtime_pb2.ExpertRequest(metadata=write_metadata({"beat": []})))


class Listener(Protocol):
    """Who is told what a hop says. Calls come from the event loop and must not wait."""

    def on_output(self, source: "HopSession", step: Step, hidden: torch.Tensor) -> None: ...

    def on_link(self, source: "HopSession", link: Link, why: str) -> None: ...

    def on_failure(self, source: "HopSession", error: SwarmFailure) -> None: ...


class _HeardReader:
    """A stream on which every part of a message is a sign of life: a large one may take long on a slow link."""

    def __init__(self, reader: asyncio.StreamReader, heard: Callable[[], None]) -> None:
        self._reader, self._heard = reader, heard

    async def readexactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = await self._reader.read(size - len(data))
            if not part:
                raise asyncio.IncompleteReadError(bytes(data), size)
            data += part
            self._heard()
        return bytes(data)


class HopSession:
    """A session on one server. Any error leaves it unusable; `close()` frees the server's cache.

    `has_heartbeats` tells servers of GeoPETALS from stock ones, `beat` is what the last heartbeat said, `frames` how
    many messages came.
    """

    def __init__(
        self, hop: Hop, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dialect: PetalsDialect
    ) -> None:
        self.hop = hop
        self.has_heartbeats = False
        self.beat = Beat()
        self.frames = 0
        self.silence = Silence(SERVER_SILENCE_S)
        self._reader = _HeardReader(reader, self.silence.heard)
        self._writer = writer
        self._dialect: Dialect = dialect
        self._ping_due = Every(CLIENT_BEAT_S)
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        p2p: P2P,
        hop: Hop,
        swarm: str,
        opening: Opening,
        *,
        session_id: str,
        batch: int,
        hidden_size: int,
        max_length: int,
        connect_timeout_s: float,
        alloc_timeout_s: float,
    ) -> "HopSession":
        """Open a stream and reserve `max_length` tokens for each of `batch` sequences.

        Raises ServerGone, ServerFull or ServerRefused.
        """
        reader, writer = await open_stream(p2p, hop.peer_id, "rpc_inference", connect_timeout_s)
        dialect = PetalsDialect(CHAIN_DELIMITER.join(block_uids(swarm, hop.start, hop.end)), session_id)
        session = cls(hop, reader, writer, dialect)
        nothing = torch.empty(batch, 0, hidden_size)  # PETALS: no tokens means only to reserve the cache
        metadata = {"max_length": max_length, "alloc_timeout": alloc_timeout_s, KEY: opening.to_dict()}
        try:
            writer.write(frame(dialect.words(nothing, metadata=metadata)))
            async with asyncio.timeout(connect_timeout_s + alloc_timeout_s):
                await session._wait_open(_OPENING_SILENCE_S if hop.protocol else None)
        except TimeoutError as error:
            session.abort()
            raise gone(hop.peer_id, "no answer to the opening of a session") from error
        except BaseException:
            session.abort()
            raise
        return session

    async def _wait_open(self, silence_s: float | None) -> None:
        """Until the server has reserved the cache; it says from the first moment on that it is there."""
        metadata: dict[str, Any] = {"beat": []}
        while "beat" in metadata:
            async with asyncio.timeout(silence_s):
                metadata, _ = await self._receive()
        if version_of(metadata):
            self.has_heartbeats = True
            self._dialect = RingDialect()

    def listen(self, listener: Listener) -> None:
        """Tell the listener what comes, until the hop fails or is closed."""
        self._listening = asyncio.create_task(self._listen(listener))

    def post(
        self, step: Step, hidden: torch.Tensor, hypo_ids: torch.Tensor | None, prompts: torch.Tensor | None
    ) -> None:
        """Send a step: hidden states [batch, tokens, hidden] for this hop's blocks.

        `prompts` [blocks of the hop, batch or 1, prefix, hidden] are added to the first positions of each block's
        input.
        """
        if not self._writer.is_closing():
            self._writer.write(frame(self._dialect.request(step, hidden, hypo_ids, prompts)))

    def show(self, credential: bytes) -> None:
        """A ticket for more than the one that opened the session."""
        if self.has_heartbeats and not self._writer.is_closing():
            shown = write_metadata(credential_shown(credential))
            self._writer.write(frame(runtime_pb2.ExpertRequest(metadata=shown)))

    async def drain(self) -> None:
        """Wait until the connection takes more. Raises ServerGone."""
        try:
            await self._writer.drain()
        except UNREACHABLE as error:
            raise gone(self.hop.peer_id, "the connection was lost") from error

    def tick(self, seconds: float) -> SwarmFailure | None:
        """Show that this client is there. Returns an error once the server has been silent for too long."""
        if not self.has_heartbeats:
            return None
        if self._ping_due.is_due(seconds) and not self._writer.is_closing():
            self._writer.write(_PING)
        if self.silence.lasts(seconds):
            return gone(self.hop.peer_id, f"nothing was heard of it for {self.silence.limit_s:.1f} s")
        return None

    async def close(self) -> None:
        """Tell the server that the session is over, as PETALS' clients do."""
        try:
            self._writer.write(frame(runtime_pb2.ExpertRequest()) + end_of_stream())
            await self._writer.drain()
        except (ConnectionError, RuntimeError):
            return
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop the connection; the server frees the cache when it notices."""
        if self._listening is not None:
            self._listening.cancel()
        close(self._writer)

    async def _listen(self, listener: Listener) -> None:
        try:
            while True:
                metadata, hidden = await self._receive()
                if hidden is not None:
                    listener.on_output(self, self._dialect.answered(metadata), hidden)
                elif (beat := Beat.read(metadata)) is not None:
                    self.beat = beat
                elif (report := read_link(metadata)) is not None:
                    listener.on_link(self, *report)
        except WireError as error:
            text = f"server {short_peer(self.hop.peer_id)} sent what is no answer: {error}"
            listener.on_failure(self, ServerBroken(text))
        except SwarmFailure as error:
            listener.on_failure(self, error)

    async def _receive(self) -> tuple[dict[str, Any], torch.Tensor | None]:
        try:
            response = await read_message(self._reader, runtime_pb2.ExpertResponse, peer=self.hop.peer_id)
        except UNREACHABLE as error:
            raise gone(self.hop.peer_id, "the connection was lost") from error
        if response is None:
            raise gone(self.hop.peer_id, "it ended the session")
        self.frames += 1
        hidden = deserialize(response.tensors[0]) if response.tensors else None
        return read_metadata(response.metadata), hidden
