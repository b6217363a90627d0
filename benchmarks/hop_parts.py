"""What a hop is made of, each part measured alone and at the pace of a chain, where others run in between.

Measured in a tight loop they cost a third of that: nobody has to be woken, and all code is in the processor's caches.
"""

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from geopetals.client.runtime import new_event_loop
from geopetals.swarm.block_ops import StepInput
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.ring_messages import Step, Want
from geopetals.swarm.scheduler import Scheduler
from geopetals.swarm.stage import load_stage
from geopetals.swarm.wire import deserialize, frame, read_message, read_metadata, serialize

PACE_S = 0.003
_REPEATS = 500
_ECHO = "GeoPetals.benchmark_echo"


def parts_of_a_hop(directory: Path) -> dict[str, float]:
    """Medians in milliseconds of `serialize`, `thread` and `p2pd`, for hidden states of the model in `directory`."""
    checkpoint = Checkpoint.open(str(directory))
    hidden = torch.zeros(1, 1, checkpoint.config.hidden_size)
    loop = new_event_loop()
    try:
        return {
            "serialize": _serialize_ms(hidden),
            "thread": loop.run_until_complete(_thread_ms(checkpoint)),
            "p2pd": loop.run_until_complete(_p2pd_ms(hidden)),
        }
    finally:
        loop.close()


def _serialize_ms(hidden: torch.Tensor) -> float:
    """Hidden states to a message's bytes and back."""

    def once() -> None:
        data = frame(_message(hidden))
        message = runtime_pb2.ExpertRequest.FromString(data[9:])
        Step.read(read_metadata(message.metadata))
        deserialize(message.tensors[0])

    return statistics.median(_time_ms(once) for _ in range(_REPEATS))


def _time_ms(function: Callable[[], object]) -> float:
    time.sleep(PACE_S)
    began = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - began)


async def _thread_ms(checkpoint: Checkpoint) -> float:
    """From the event loop through the scheduler to the compute thread and back, but for the computing."""
    stage = load_stage(checkpoint, 0, 1, dtype=torch.float32, device=torch.device("cpu"))
    compute = ComputeThread(asyncio.get_running_loop())
    scheduler = Scheduler(stage, compute)
    step = StepInput(hidden=torch.zeros(1, 1, stage.hidden_size), prompts=None, hypo_ids=None)
    costs = []
    try:
        kv = stage.allocate_kv(0, 1, batch=1, max_length=2 * _REPEATS)
        for _ in range(_REPEATS):
            await asyncio.sleep(PACE_S)
            began = time.perf_counter()
            await scheduler.infer(kv, range(1), step)
            costs.append(1e3 * (time.perf_counter() - began - kv.compute_s))
    finally:
        compute.stop()
    return statistics.median(costs)


async def _p2pd_ms(hidden: torch.Tensor) -> float:
    """Half a round trip of a step's frame between two processes' p2pd, on a stream that is kept."""
    server = await Network.start(NetworkConfig())
    client = await Network.start(NetworkConfig(initial_peers=await server.addresses(), client_only=True))

    async def echo(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (message := await read_message(reader, runtime_pb2.ExpertRequest, peer="")) is not None:
            writer.write(frame(message))

    try:
        await server.p2p.add_binary_stream_handler(_ECHO, echo)
        peer = PeerID.from_base58(server.peer_id)
        _, reader, writer = await client.p2p.call_binary_stream_handler(peer, _ECHO)
        data, times = frame(_message(hidden)), []
        for _ in range(_REPEATS):
            await asyncio.sleep(PACE_S)
            began = time.perf_counter()
            writer.write(data)
            await reader.readexactly(len(data))
            times.append(1e3 * (time.perf_counter() - began) / 2)
        writer.close()
        return statistics.median(times)
    finally:
        await client.stop()
        await server.stop()


def _message(hidden: torch.Tensor) -> runtime_pb2.ExpertRequest:
    return runtime_pb2.ExpertRequest(tensors=[serialize(hidden)], metadata=Step(7, 100, Want.ALL).to_bytes())
