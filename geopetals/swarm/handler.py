"""PETALS' RPCs as one block server answers them, and our push stream."""

import asyncio
import logging
from typing import Any

import torch
from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.tensor_descr import BatchTensorDescriptor

import geopetals
from geopetals import metrics
from geopetals.errors import GeoPetalsError
from geopetals.swarm.admission import Admission
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.gate import Gate, OpenGate
from geopetals.swarm.inference_service import InferenceService
from geopetals.swarm.kv_budget import KVBudget
from geopetals.swarm.limits import Limits, PeerLimits
from geopetals.swarm.message_checks import StrictRequest
from geopetals.swarm.pass_service import PassService
from geopetals.swarm.peer_calls import limited
from geopetals.swarm.push_stream import PushReceiver
from geopetals.swarm.rates import Rates
from geopetals.swarm.ring_messages import KEY, PUSH_STREAM, VERSION
from geopetals.swarm.scheduler import Scheduler
from geopetals.swarm.server_session import Push, ServerSession, read_uids
from geopetals.swarm.stack import PETALS_VERSION
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import HANDLER, read_metadata, short_peer, write_metadata

log = logging.getLogger(__name__)

_PUSH_TIMEOUT_S = 30.0
_MAX_PUSHES = 256


class BlockHandler:
    """Answers peers for the blocks of one stage. Lives on the event loop; computes in the compute thread."""

    def __init__(
        self,
        stage: Stage,
        compute: ComputeThread,
        budget: KVBudget,
        *,
        swarm: str,
        length_limit: int,
        limits: Limits = Limits(),  # noqa: B008 - immutable
        gate: Gate | None = None,
        rates: Rates | None = None,
    ) -> None:
        """`gate`: who may come in; everybody if None. `rates` hears how fast peers send."""
        self._stage, self._swarm, self.budget = stage, swarm, budget
        self._served = range(stage.start, stage.end)
        self.scheduler = Scheduler(stage, compute)
        self.admission = Admission(budget)
        self._limits = PeerLimits(limits)
        rates = rates if rates is not None else Rates()
        self._gate = gate if gate is not None else OpenGate()
        self._passes = PassService(
            stage, compute, swarm=swarm, length_limit=length_limit, limits=self._limits, gate=self._gate
        )
        self._inference = InferenceService(
            stage,
            compute,
            self.admission,
            self.scheduler,
            swarm=swarm,
            length_limit=length_limit,
            limits=self._limits,
            rates=rates,
            gate=self._gate,
            push=self._start_push,
        )
        self._receiver = PushReceiver(self._inference.sessions, self._limits, rates)
        self._pushes: set[asyncio.Task[None]] = set()
        self._p2p: P2P | None = None

    @property
    def num_sessions(self) -> int:
        return self._inference.num_sessions

    async def attach(self, p2p: P2P) -> None:
        """Register the RPCs: PETALS' under its names, ours under our own."""
        self._p2p = p2p
        self._inference.start(p2p)
        await p2p.add_binary_stream_handler(f"{HANDLER}.rpc_inference", self._inference.serve)
        await p2p.add_binary_stream_handler(PUSH_STREAM, self._receiver.serve)
        await p2p.add_binary_stream_handler(f"{HANDLER}.rpc_forward_stream", self._passes.serve_forward)
        await p2p.add_binary_stream_handler(f"{HANDLER}.rpc_backward_stream", self._passes.serve_backward)
        calls: dict[str, tuple[Any, Any]] = {
            "rpc_info": (self._info, runtime_pb2.ExpertUID),
            "rpc_push": (self._take_push, StrictRequest),
            "rpc_forward": (self._passes.forward, StrictRequest),
            "rpc_backward": (self._passes.backward, StrictRequest),
        }
        for name, (function, request) in calls.items():
            await p2p.add_protobuf_handler(f"{HANDLER}.{name}", limited(self._limits, function), request)
        _watch(self.admission)

    def end_sessions(self, error: GeoPetalsError) -> None:
        """Of clients that can be told why; the others' sessions end with `close()`."""
        self._inference.end_sessions(error)

    async def close(self) -> None:
        """End all sessions; their caches are freed before this returns."""
        await self._receiver.close()
        await self._passes.close()
        await self._inference.close()
        pushes = list(self._pushes)
        for task in pushes:
            task.cancel()
        await asyncio.gather(*pushes, return_exceptions=True)

    async def _take_push(self, request: runtime_pb2.ExpertRequest, peer: str) -> runtime_pb2.ExpertResponse:
        """A step that the previous server of the chain sends; in open swarms to know the session's id is enough."""
        self._gate.admit_push(peer)
        session_id = str(read_metadata(request.metadata).get("session_id"))
        session = self._inference.sessions.find(session_id, ServerSession)
        if session is None:
            log.debug("push.unknown_session from=%s", short_peer(peer))
        else:
            await session.pushed_step(request, peer)
        return runtime_pb2.ExpertResponse()

    def _start_push(self, push: Push) -> None:
        if len(self._pushes) >= _MAX_PUSHES:
            return
        task = asyncio.create_task(self._send_push(push))
        self._pushes.add(task)
        task.add_done_callback(self._pushes.discard)

    async def _send_push(self, push: Push) -> None:
        assert self._p2p is not None
        try:
            async with asyncio.timeout(_PUSH_TIMEOUT_S):
                await self._p2p.call_protobuf_handler(
                    PeerID.from_base58(push.peer_id), f"{HANDLER}.rpc_push", push.request, runtime_pb2.ExpertResponse
                )
        except Exception as error:  # noqa: BLE001 - the client sends the step itself too: a lost push costs time only
            log.info("push.failed to=%s reason=%r", short_peer(push.peer_id), error)

    async def _info(self, request: runtime_pb2.ExpertUID, peer: str) -> runtime_pb2.ExpertInfo:
        """PETALS' description of this server and, if a block is named, of that block's inputs and outputs."""
        info: dict[str, Any] = {
            "version": PETALS_VERSION,
            KEY: {"version": VERSION, "release": geopetals.__version__, "cache": self.admission.describe()},
            "dht_client_mode": False,
            "cache_tokens_available": self.budget.left,
            "batching": self._stage.batching.describe(),
            "decode_batches": sorted(dict(self.scheduler.batch_sizes).items()),
        }
        if request.uid:
            read_uids(request.uid, served=self._served, swarm=self._swarm)
            info |= _schemas(self._stage)
        return runtime_pb2.ExpertInfo(serialized_info=write_metadata(info))


def _watch(admission: Admission) -> None:
    """Metrics outlive a handler: they must not keep its blocks."""
    metrics.watch_cache(
        total=admission.budget.total,
        reserved=lambda: admission.budget.used,
        running=lambda: admission.running,
        waiting=lambda: admission.waiting,
    )


def _schemas(stage: Stage) -> dict[str, Any]:
    """The tensor descriptions that stock clients ask for before their first request."""
    none = runtime_pb2.CompressionType.NONE
    hidden = BatchTensorDescriptor(1, 2048, stage.hidden_size, dtype=stage.dtype, compression=none)
    prompts = BatchTensorDescriptor((), dtype=stage.dtype)
    hypo_ids = BatchTensorDescriptor((), dtype=torch.int64)
    return {
        "forward_schema": ((hidden,), {}),
        "outputs_schema": (hidden,),
        "keyword_names": (),
        "inference_schema": ((hidden, prompts, hypo_ids), {}),
    }
