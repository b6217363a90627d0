"""One client's session on a block server: its attention cache and the steps that extend it."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hivemind.proto import runtime_pb2

from geopetals.errors import ServerMoving
from geopetals.swarm import block_ops
from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.ring_messages import Opening
from geopetals.swarm.scheduler import Scheduler
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import (
    MAX_BATCH,
    UNARY_LIMIT_BYTES,
    WireError,
    frame,
    read_metadata,
    serialize,
    write_metadata,
)

MAX_ALLOC_TIMEOUT_S = 600.0
_REMEMBERED_STEPS = 64
_MAX_NAME, _MAX_STEP_ID_BYTES = 200, 300


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """What the first message of a stream asks for, checked. `opening` is None for clients that speak PETALS alone."""

    span: range
    batch: int
    max_length: int
    session_id: str | None
    alloc_timeout_s: float
    args_structure: Any
    opening: Opening | None = None

    @property
    def block_tokens(self) -> int:
        return len(self.span) * self.batch * self.max_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """A step's output on its way to the next server of the chain."""

    peer_id: str
    request: runtime_pb2.ExpertRequest


def read_session_request(
    first: runtime_pb2.ExpertRequest, *, served: range, swarm: str, length_limit: int
) -> SessionRequest:
    metadata = read_metadata(first.metadata)
    max_length = metadata.get("max_length")
    if not isinstance(max_length, int) or not 1 <= max_length <= length_limit:
        raise WireError(f"max_length must be 1 to {length_limit} tokens on this server, got {max_length!r}")
    batch = first.tensors[0].size[0] if first.tensors and first.tensors[0].size else 1
    if not 1 <= batch <= MAX_BATCH:
        raise WireError(f"a batch has 1 to {MAX_BATCH} sequences, got {batch}")
    session_id, wait = metadata.get("session_id"), metadata.get("alloc_timeout", 0.0)
    if session_id is not None and not (isinstance(session_id, str) and len(session_id) <= _MAX_NAME):
        raise WireError(f"session_id must be a string of at most {_MAX_NAME} characters")
    if not isinstance(wait, int | float) or not 0 <= wait <= MAX_ALLOC_TIMEOUT_S:
        raise WireError(f"alloc_timeout must be 0 to {MAX_ALLOC_TIMEOUT_S:.0f} seconds")
    return SessionRequest(
        span=read_uids(first.uid, served=served, swarm=swarm),
        batch=batch,
        max_length=max_length,
        session_id=session_id,
        alloc_timeout_s=float(wait),
        args_structure=metadata.get("args_structure"),
        opening=Opening.read(metadata),
    )


def read_uids(text: str, *, served: range, swarm: str) -> range:
    """The consecutive blocks that space-separated PETALS uids name, all of them served here.

    Raises ServerMoving for others, as whoever asks knows where the server was before, and WireError.
    """
    if len(text) > len(served) * (len(swarm) + 8):
        raise ServerMoving(f"this server serves {len(served)} blocks of {swarm}, more were asked for.")
    blocks = []
    for uid in text.split(" "):
        prefix, _, index = uid.rpartition(".")
        if prefix != swarm or not index.isdecimal() or len(index) > 6:
            raise WireError(f"this server serves blocks of {swarm}, not {uid[:80]!r}")
        blocks.append(int(index))
    span = range(blocks[0], blocks[-1] + 1)
    if blocks != list(span):
        raise WireError("the blocks asked for are not consecutive")
    if span.start < served.start or span.stop > served.stop:
        raise ServerMoving(f"this server serves blocks {served.start}:{served.stop}, not {span.start}:{span.stop}.")
    return span


class ServerSession:
    """A session of a client that speaks PETALS alone.

    Steps arrive from the client's stream and from the previous server; each step id is computed once, in order.
    """

    def __init__(
        self,
        request: SessionRequest,
        kv: SessionKV,
        *,
        stage: Stage,
        scheduler: Scheduler,
        swarm: str,
        respond: Callable[[bytes], None],
        push: Callable[[Push], None],
    ) -> None:
        self.request = request
        self._kv = kv
        self._stage, self._scheduler, self._swarm = stage, scheduler, swarm
        self._respond, self._push = respond, push
        self._pusher: str | None = None
        self._seen: deque[object] = deque(maxlen=_REMEMBERED_STEPS)
        self._turn = asyncio.Lock()

    async def pushed_step(self, request: runtime_pb2.ExpertRequest, peer: str) -> None:
        """A step from the previous server. PETALS does not say who that is: whoever knew the id first, and no other."""
        if self._pusher not in (None, peer):
            raise WireError("another server pushes into this session")
        await self.step(request)
        self._pusher = peer

    async def step(self, request: runtime_pb2.ExpertRequest) -> None:
        """Compute one step and answer it; raises WireError for what cannot be computed."""
        metadata = read_metadata(request.metadata)
        async with self._turn:
            step_id = metadata.get("step_id")
            if step_id is not None and len(step_id := write_metadata({"": step_id})) > _MAX_STEP_ID_BYTES:
                raise WireError("a step_id should be short: the last ones are remembered")
            if step_id is not None and step_id in self._seen:
                return
            answer, push = await self._run(request, metadata)
            if step_id is not None:
                self._seen.append(step_id)
        self._respond(answer)
        if push is not None:
            self._push(push)

    async def _run(self, request: runtime_pb2.ExpertRequest, metadata: dict[str, Any]) -> tuple[bytes, Push | None]:
        step = block_ops.read_step(request.tensors, self.request.args_structure, self._stage, self.request.span)
        output = serialize(await self._scheduler.infer(self._kv, self.request.span, step))
        push = self._next_hop(request, metadata, output) if step.prompts is None else None
        return frame(runtime_pb2.ExpertResponse(tensors=[output])), push

    def _next_hop(
        self, request: runtime_pb2.ExpertRequest, metadata: dict[str, Any], output: runtime_pb2.Tensor
    ) -> Push | None:
        """PETALS' push: the next server gets the step at the same time as the client does, and may start earlier.

        Only what fits a unary call is pushed; the client sends everything anyway.
        """
        chain = metadata.get("next_servers")
        if not chain or len(output.buffer) > UNARY_LIMIT_BYTES:
            return None
        try:
            peer_id, session_id, start, end = chain[0]
            uid = " ".join(f"{self._swarm}.{block}" for block in range(int(start), min(int(end), int(start) + 1000)))
            pushed = {**metadata, "session_id": str(session_id), "next_servers": list(chain[1:]), "pushed": True}
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            raise WireError("next_servers must list (peer id, session id, start, end)") from error
        tensors = [output, *request.tensors[1:]]
        message = runtime_pb2.ExpertRequest(uid=uid, tensors=tensors, metadata=write_metadata(pushed))
        return Push(peer_id=str(peer_id), request=message)
