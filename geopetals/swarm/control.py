"""The stream that a member of a swarm keeps to its coordinator. Both ends call, answer, notify and show that they live.

A frame's uid says what it is: `call` {id, method, body}, `answer` {id, body or error}, `notify` {method, body}, `ping`.
Unknown kinds are ignored, so that a newer end may say more.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure, P2PDaemonError

from geopetals.errors import Busy, ControlLost, GeoPetalsError
from geopetals.swarm.control_frames import describe_error, error_of, read_frame, write_frame
from geopetals.swarm.heartbeat import Every, Silence
from geopetals.swarm.wire import WireError, short_peer

log = logging.getLogger(__name__)

CONTROL_STREAM = "GeoPetals.control"
PING_S = 2.0
SILENCE_S = 8.0
DIAL_TIMEOUT_S = 15.0
_TICK_S = 0.5
_MAX_CALLS = 64
_MAX_UNREAD_BYTES = 4 * 2**20
_UNREACHABLE = (ControlFailure, DispatchFailure, P2PDaemonError, ConnectionError, asyncio.IncompleteReadError, OSError)

OnCall = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
OnNotify = Callable[[str, dict[str, Any]], None]


class ControlChannel:
    """One end of the stream. `peer_id` is authenticated by libp2p; `on_call` and `on_notify` may be replaced any time.

    An exception of `on_call` becomes the answer: GeoPetalsErrors and ValueErrors with their text, others without.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer_id: str,
        *,
        on_call: OnCall,
        on_notify: OnNotify,
    ) -> None:
        self.peer_id = peer_id
        self.on_call, self.on_notify = on_call, on_notify
        self.closed = asyncio.Event()
        self._reader, self._writer = reader, writer
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._reading: asyncio.Task[None] | None = None
        self._silence, self._ping_due = Silence(SILENCE_S), Every(PING_S)

    def start(self) -> None:
        """Begin to read; the channel ends with the stream, or by `close()`."""
        if self._reading is None and not self.closed.is_set():
            self._reading = asyncio.create_task(self._read())
            self._tick(time.monotonic())

    async def run(self) -> None:
        """Until the channel has ended, for whatever reason. To cancel it closes the channel."""
        self.start()
        try:
            await self.closed.wait()
        finally:
            self.close()

    async def call(self, method: str, body: dict[str, Any], *, timeout_s: float = 10) -> dict[str, Any]:
        """The other end's answer.

        Raises the GeoPetalsError that it answered with, or ControlLost if it is gone or silent for `timeout_s`.
        """
        self._require_open()
        number = next(self._ids)
        self._waiting[number] = answer = asyncio.get_running_loop().create_future()
        try:
            self._write("call", {"id": number, "method": method, "body": body})
            async with asyncio.timeout(timeout_s):
                contents: dict[str, Any] = await answer
                return contents
        except TimeoutError:
            raise self._lost(f"it did not answer {method} within {timeout_s:.0f} s") from None
        finally:
            del self._waiting[number]

    def notify(self, method: str, body: dict[str, Any]) -> None:
        """Tell the other end. Raises ControlLost if the channel has ended."""
        self._require_open()
        self._write("notify", {"method": method, "body": body})

    def close(self) -> None:
        if self.closed.is_set():
            return
        self.closed.set()
        if self._reading is not None:
            self._reading.cancel()
        for task in self._answering:
            task.cancel()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._lost("the channel ended"))
        self._writer.close()

    def _require_open(self) -> None:
        if self.closed.is_set():
            raise self._lost("the channel ended")

    def _lost(self, why: str) -> ControlLost:
        return ControlLost(f"no control channel to {short_peer(self.peer_id)}: {why}.")

    def _write(self, kind: str, contents: dict[str, Any]) -> None:
        data = write_frame(kind, contents)
        if self._writer.is_closing():
            self.close()
            raise self._lost("the stream is closed")
        if self._writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self._writer.transport.abort()  # close() would wait for what is not read
            self.close()
            raise self._lost("it does not read what it is sent")
        self._writer.write(data)

    def _tick(self, last: float) -> None:
        if self.closed.is_set():
            return
        now = time.monotonic()
        passed = min(now - last, 2 * _TICK_S)
        if self._silence.lasts(passed):
            log.info("control.silent peer=%s", short_peer(self.peer_id))
            self.close()
            return
        if self._ping_due.is_due(passed):
            with contextlib.suppress(ControlLost):
                self._write("ping", {})
        asyncio.get_running_loop().call_later(_TICK_S, self._tick, now)

    async def _read(self) -> None:
        try:
            while True:
                kind, contents = await read_frame(self._reader)
                self._silence.heard()
                self._take(kind, contents)
        except (asyncio.IncompleteReadError, ConnectionError):
            log.debug("control.ended peer=%s", short_peer(self.peer_id))
        except (WireError, ControlLost) as error:
            log.info("control.refused peer=%s reason=%.500s", short_peer(self.peer_id), error)
        except Exception:
            log.exception("control.failed peer=%s", short_peer(self.peer_id))
        finally:
            self.close()

    def _take(self, kind: str, contents: dict[str, Any]) -> None:
        if kind == "answer":
            self._take_answer(contents)
        elif kind == "call":
            self._take_call(contents)
        elif kind == "notify":
            self.on_notify(*_addressed(contents))

    def _take_answer(self, contents: dict[str, Any]) -> None:
        number, body = contents.get("id"), contents.get("body")
        answer = self._waiting.get(number) if isinstance(number, int) else None
        if answer is None or answer.done():
            return
        if isinstance(body, dict):
            answer.set_result(body)
        else:
            answer.set_exception(error_of(contents.get("error")))

    def _take_call(self, contents: dict[str, Any]) -> None:
        number = contents.get("id")
        method, body = _addressed(contents)
        if not isinstance(number, int):
            raise WireError("a call must have a number")
        if len(self._answering) >= _MAX_CALLS:
            busy = Busy(f"at most {_MAX_CALLS} calls at a time: wait for answers.", retry_after_s=1.0)
            self._write("answer", {"id": number, "error": describe_error(busy)})
            return
        task = asyncio.create_task(self._answer(number, method, body))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, number: int, method: str, body: dict[str, Any]) -> None:
        try:
            answer = {"id": number, "body": await self.on_call(method, body)}
        except (GeoPetalsError, ValueError) as error:
            log.info("control.call_refused peer=%s method=%.40s why=%.300s", short_peer(self.peer_id), method, error)
            answer = {"id": number, "error": describe_error(error)}
        except Exception as error:
            log.exception("control.call_failed peer=%s method=%.40s", short_peer(self.peer_id), method)
            reason = RuntimeError(f"internal error: {type(error).__name__}")
            answer = {"id": number, "error": describe_error(reason)}
        with contextlib.suppress(ControlLost):
            self._write_answer(number, answer)

    def _write_answer(self, number: int, answer: dict[str, Any]) -> None:
        try:
            self._write("answer", answer)
        except WireError as error:
            log.warning("control.answer_too_large peer=%s", short_peer(self.peer_id))
            self._write("answer", {"id": number, "error": describe_error(error)})


def _addressed(contents: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    method, body = contents.get("method"), contents.get("body")
    if not isinstance(method, str) or not isinstance(body, dict):
        raise WireError("a control message must name its method and have a body")
    return method, body


async def dial(p2p: P2P, peer_id: str, *, on_call: OnCall, on_notify: OnNotify) -> ControlChannel:
    """A started channel to a coordinator that this process is connected to or can find. Raises ControlLost."""
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            peer = PeerID.from_base58(peer_id)
            _, reader, writer = await p2p.call_binary_stream_handler(peer, CONTROL_STREAM)
    except TimeoutError:
        reason = f"no connection within {DIAL_TIMEOUT_S:.0f} s"
        raise ControlLost(f"cannot reach the coordinator {short_peer(peer_id)} ({reason}).") from None
    except (*_UNREACHABLE, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ControlLost(f"cannot reach the coordinator {short_peer(peer_id)} ({reason}).") from error
    channel = ControlChannel(reader, writer, peer_id, on_call=on_call, on_notify=on_notify)
    channel.start()
    return channel


async def listen(p2p: P2P, on_channel: Callable[[ControlChannel], Awaitable[None]]) -> None:
    """Have `on_channel` look after each channel that a peer opens; it sets the handlers and awaits `run()`."""

    async def accept(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer_id = info.peer_id.to_base58()
        channel = ControlChannel(reader, writer, peer_id, on_call=_refuse_call, on_notify=_ignore)
        try:
            await on_channel(channel)
        finally:
            channel.close()

    await p2p.add_binary_stream_handler(CONTROL_STREAM, accept)


async def _refuse_call(method: str, body: dict[str, Any]) -> dict[str, Any]:
    raise WireError(f"nobody answers {method[:40]} here")


def _ignore(method: str, body: dict[str, Any]) -> None:
    """Notifications before somebody listens."""
