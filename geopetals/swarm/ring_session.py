"""A session as GeoPETALS' clients open it: numbered steps, pipelined, pushed on to the next server of the chain."""

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from hivemind.p2p import P2P
from hivemind.proto import runtime_pb2

from geopetals import metrics
from geopetals.errors import ServerBroken, ServerFull
from geopetals.swarm import block_ops
from geopetals.swarm.admission import STALLED_S, UNUSED_S
from geopetals.swarm.block_ops import StepInput
from geopetals.swarm.cache_growth import CacheGrowth
from geopetals.swarm.heartbeat import CLIENT_SILENCE_S, Every, Silence
from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.push_stream import LinkRefused, PushLink
from geopetals.swarm.ring_messages import MAX_CHUNK_BYTES, Beat, Link, Opening, Step, Want, link_report
from geopetals.swarm.scheduler import Scheduler
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import BadInput, WireError, close, frame, is_finite, read_metadata, send, serialize

_WIDEST_BYTES = 4
_WIDER = 2  # float32 for bfloat16
_MAX_TENSORS = 3
_MAX_UNREAD_BYTES = 2**20
_MAX_WAITING = 16
"""Steps that wait for the one before; whoever sends more is read no further until there is room."""


class _Waiting(NamedTuple):
    step: Step
    request: runtime_pb2.ExpertRequest
    pushed: bool
    arrived_s: float


class RingSession:
    """Steps come from the client or from the previous server, in the order of their numbers.

    Lives on the event loop: `run()` computes what `feed()` brings, `keep_link()` holds the link to the next server,
    `tick()` sends signs of life and notices the client's silence.
    """

    def __init__(
        self, span: range, batch: int, opening: Opening, writer: asyncio.StreamWriter, *, stage: Stage
    ) -> None:
        self._span, self._batch, self._opening = span, batch, opening
        self._writer, self._stage = writer, stage
        self._steps: asyncio.Queue[_Waiting] = asyncio.Queue(_MAX_WAITING)
        self._received = self._computed = self._handed_on = 0
        self._upstreams: set[asyncio.StreamWriter] = set()
        self._link: PushLink | None = None
        self._link_decided = asyncio.Event()
        self._client_silence = Silence(CLIENT_SILENCE_S)
        self._stall: Silence | None = None
        self._progress = (0, 0, 0)
        self._beat = Every(opening.heartbeat_s)
        self.is_listening = False
        self._is_answering, self._unsent_bytes = False, 0
        self._is_closed = False
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if opening.next_hop is None:
            self._link_decided.set()

    @property
    def previous(self) -> str | None:
        """The peer that may push steps."""
        return self._opening.previous

    async def feed(self, request: runtime_pb2.ExpertRequest, *, pushed: bool) -> None:
        """Take a step, waiting while too many wait already.

        Raises WireError for one that is none, or out of order, and ConnectionResetError once the session has ended.
        """
        self._require_open()
        step = Step.read(read_metadata(request.metadata))
        self._check_size(request)
        if step.number < self._received:
            return
        if step.number > self._received:
            raise WireError(f"step {step.number} came before step {self._received}")
        self._received += 1
        await self._steps.put(_Waiting(step, request, pushed, time.perf_counter()))

    def fail(self, error: Exception) -> None:
        """End the session with an error for its client."""
        if not self.failed.done():
            self.failed.set_exception(error)

    def heard_client(self) -> None:
        self._client_silence.heard()

    def attach_upstream(self, writer: asyncio.StreamWriter) -> None:
        """Raises WireError if there is one already, and ConnectionResetError once the session has ended."""
        self._require_open()
        if self._upstreams:
            raise WireError("a push stream into this session is open already")
        self._upstreams.add(writer)

    def detach_upstream(self, writer: asyncio.StreamWriter) -> None:
        self._upstreams.discard(writer)

    def tick(self, seconds: float) -> None:
        if self._writer.is_closing():  # nobody reads of the stream's end while steps wait for room
            self.fail(ConnectionResetError("the client is gone"))
        if self._link is not None:
            self._link.tick(seconds)
        if self._is_answering and self._unsent_bytes != (unsent := self._writer.transport.get_write_buffer_size()):
            self._unsent_bytes = unsent
            self.heard_client()  # it reads
        if (self.is_listening or self._is_answering) and self._client_silence.lasts(seconds):
            self.fail(ServerFull(f"nothing was heard of the client for {CLIENT_SILENCE_S:.0f} s: its cache is freed."))
        self._check_progress(seconds)
        if self._beat.is_due(seconds):
            beat = Beat(self._received, self._computed, self._handed_on)
            data = frame(runtime_pb2.ExpertResponse(metadata=beat.to_bytes()))
            for writer in (self._writer, *self._upstreams):
                if not writer.is_closing() and writer.transport.get_write_buffer_size() <= _MAX_UNREAD_BYTES:
                    writer.write(data)

    def close(self) -> None:
        """Close the links to both neighbours; the client's stream is its owner's to close."""
        self._is_closed = True
        while not self._steps.empty():  # whoever waits for room goes on, and hears of the end at the next step
            self._steps.get_nowait()
        for writer in self._upstreams:
            close(writer)
        if self._link is not None:
            self._link.close()
        if not self.failed.cancel() and not self.failed.cancelled():
            self.failed.exception()  # somebody may have failed it when nobody was waiting any more

    def _require_open(self) -> None:
        if self._is_closed:
            raise ConnectionResetError("the session has ended")

    def _check_size(self, request: runtime_pb2.ExpertRequest) -> None:
        """Several steps wait in memory: each is a piece, or one token however large, and prompts for each block.

        Pieces are cut in the client's format: the server before this one may have sent its output in a wider one.
        """
        most = _WIDER * max(MAX_CHUNK_BYTES, self._batch * self._stage.hidden_size * _WIDEST_BYTES)
        if len(request.tensors) > _MAX_TENSORS:
            raise WireError(f"a step has at most {_MAX_TENSORS} tensors")
        sizes = [len(tensor.buffer) for tensor in request.tensors]
        if sizes and sizes[0] > most:
            raise WireError(f"a step has at most {most} bytes of hidden states: send it in pieces")
        most *= 1 + len(self._span)
        if sum(sizes) > most:
            raise WireError(f"a step has at most {most} bytes in all: send it in pieces")

    def _check_progress(self, seconds: float) -> None:
        """Cache that is not used is given to others; the client can have it filled again."""
        progress = self._received, self._computed, self._handed_on
        if progress != self._progress:
            self._progress, self._stall = progress, Silence(STALLED_S)
        elif self._stall is not None and self._stall.lasts(seconds):
            self.fail(ServerFull(f"the session did not get on for {self._stall.limit_s:.0f} s and its cache is freed."))

    # -- computing -----------------------------------------------------------------------------------------------------

    async def run(self, kv: SessionKV, growth: CacheGrowth, scheduler: Scheduler) -> None:
        """Compute steps until cancelled. Raises what cannot be computed."""
        self._stall = Silence(UNUSED_S)
        while True:
            waiting = await self._steps.get()
            step, began_s = waiting.step, time.perf_counter()
            checked = self._check(waiting, kv)
            await growth.make_room(checked.hidden.shape[1])
            checked_s = time.perf_counter()
            output = await scheduler.infer(kv, self._span, checked)
            computed_s = time.perf_counter()
            if not is_finite(output):
                raise ServerBroken("the blocks' output is not finite: another server may do better.")
            self._computed += 1
            tensors = self._outgoing(step, output, waiting.request.tensors)
            metadata = waiting.request.metadata
            if self._opening.trace:
                handled_s = time.perf_counter() - began_s - kv.compute_s
                times = (began_s - waiting.arrived_s, kv.compute_s, handled_s)
                metadata = Step(step.number, step.position, step.want, step.relay, (*step.trace, times)).to_bytes()
            packed_s = time.perf_counter()
            await self._hand_on(step, tensors, metadata)
            self._handed_on += 1
            metrics.HOP_SERIALIZE.observe(checked_s - began_s + packed_s - computed_s)
            metrics.HOP_NETWORK.observe(time.perf_counter() - packed_s)

    def _check(self, waiting: _Waiting, kv: SessionKV) -> StepInput:
        """The step's input, or WireError; BadInput if the previous server is to blame."""
        try:
            if waiting.step.position != kv.length:
                raise WireError(f"step {waiting.step.number} is for position {waiting.step.position}, not {kv.length}")
            step = block_ops.read_step(waiting.request.tensors, None, self._stage, self._span)
            if step.hidden.shape[0] != self._batch:
                raise WireError(f"the session has a batch of {self._batch}, got {step.hidden.shape[0]}")
        except WireError as error:
            if waiting.pushed:
                raise BadInput(str(error)) from error
            raise
        return step

    def _outgoing(
        self, step: Step, output: torch.Tensor, inputs: Sequence[runtime_pb2.Tensor]
    ) -> list[runtime_pb2.Tensor]:
        """What is sent on: the positions that are needed, and for the next server the order of the rows."""
        if self._opening.is_last:
            if step.want is Want.NOTHING:
                return []
            return [serialize(output[:, -1:] if step.want is Want.LAST else output)]
        return [serialize(output), *inputs[1:]] if len(inputs) > 2 else [serialize(output)]

    # -- handing on ----------------------------------------------------------------------------------------------------

    async def keep_link(self, p2p: P2P, opening: Opening) -> None:
        """Open the link to the next server and tell the client what becomes of it. Until cancelled."""
        assert opening.next_hop is not None
        try:
            self._link = await PushLink.open(p2p, opening.next_hop)
        except LinkRefused as error:
            self._report(Link.REFUSED, str(error))
            return
        finally:
            self._link_decided.set()
        self._report(Link.UP, "")
        self._report(Link.LOST, await self._link.wait_lost())

    def _report(self, link: Link, why: str) -> None:
        send(self._writer, frame(runtime_pb2.ExpertResponse(metadata=link_report(link, why))))

    async def _hand_on(self, step: Step, tensors: list[runtime_pb2.Tensor], metadata: bytes) -> None:
        if not tensors:
            return
        if not self._link_decided.is_set():
            await self._link_decided.wait()
        if self._link is not None and not step.relay:
            await self._link.send(frame(runtime_pb2.ExpertRequest(tensors=tensors, metadata=metadata)))
        else:
            send(self._writer, frame(runtime_pb2.ExpertResponse(tensors=tensors[:1], metadata=metadata)))
            self._is_answering = True
            try:
                await self._writer.drain()
            finally:
                self._is_answering = False
