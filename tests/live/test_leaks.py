"""Five hundred short sessions, a third of them cancelled or killed: servers and the client are as they were before."""

import asyncio
import gc
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from geopetals.client.session import InferenceSession
from geopetals.swarm.local import LocalServer, LocalSwarm
from tests.live.commands import wait_for
from tests.live.conftest import Connect
from tests.live.free_cache import wait_all_free
from tests.live.test_fuzz import footprint, memory, wait_no_more

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

SEED, HIDDEN, LENGTH = 3, 64, 12
WARM_UP, FINISHED, CANCELLED, DROPPED, KILLED = 40, 330, 60, 60, 50
AT_ONCE = 12
GROWTH_BYTES = 32 * 2**20
KILLED_CLIENT = """
import asyncio, sys, time, torch
from geopetals import AutoDistributedModelForCausalLM
from geopetals.client.session import InferenceSession
model = AutoDistributedModelForCausalLM.from_pretrained(sys.argv[1], join=sys.argv[2])
sessions = [InferenceSession(model.swarm, 12) for _ in range(int(sys.argv[3]))]
async def begin():
    await asyncio.gather(*(session.step_async(torch.zeros(1, 3, 64), None) for session in sessions))
model.swarm.run(begin())
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def swarm(llama: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(str(llama)) as started:
        yield started.start(spans=[(0, 3), (3, 6)])


async def finish(session: InferenceSession) -> None:
    await session.step_async(torch.zeros(1, 3, HIDDEN), None)
    await session.step_async(torch.zeros(1, 1, HIDDEN), None, last_only=True)
    await session._end()


async def cancel(session: InferenceSession, after_s: float) -> None:
    """While it opens, in its prefill or in between, wherever that is."""
    task = asyncio.create_task(finish(session))
    await asyncio.wait({task}, timeout=after_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    session._abandon()


async def drop(session: InferenceSession) -> None:
    """The connections are gone without a word."""
    await session.step_async(torch.zeros(1, 3, HIDDEN), None)
    session._abandon()


async def run_sessions(model: Any, kinds: list[str]) -> None:
    free, chance = asyncio.Semaphore(AT_ONCE), random.Random(SEED)

    async def one(kind: str, after_s: float) -> None:
        session = InferenceSession(model.swarm, LENGTH)
        async with free:
            match kind:
                case "finished":
                    await finish(session)
                case "cancelled":
                    await cancel(session, after_s)
                case "dropped":
                    await drop(session)

    async with asyncio.TaskGroup() as group:
        for kind in kinds:
            group.create_task(one(kind, chance.uniform(0.0, 0.15)))


def kill_a_client(llama: Path, swarm: LocalSwarm, sessions: int) -> None:
    """With so many sessions open."""
    command = [sys.executable, "-c", KILLED_CLIENT, str(llama), swarm.token, str(sessions)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n"
        finally:
            client.kill()


def idle(model: Any, servers: list[LocalServer]) -> bool:
    """No session anywhere, and nothing that is about to end."""
    first = footprint(servers), ours(model)
    time.sleep(0.5)
    return not model.swarm._chains and first == (footprint(servers), ours(model))


def ours(model: Any) -> tuple[int, int, list[str]]:
    """Descriptors and threads of this process, and what of ours runs on the client's event loop.

    What is hivemind's does not count: it comes and goes to refresh its cache of the DHT.
    """

    async def tasks() -> list[str]:
        works: list[Any] = [task.get_coro() for task in asyncio.all_tasks()]
        return sorted(work.__qualname__ for work in works if "/geopetals/" in work.cr_code.co_filename)

    gc.collect()
    process = psutil.Process()
    return process.num_fds(), process.num_threads(), model.swarm.run(tasks())


def daemons(swarm: LocalSwarm) -> list[tuple[int, int]]:
    found = [psutil.Process(server.p2pd_pid) for server in swarm.servers]
    return [(process.num_fds(), len(process.children())) for process in found]


def test_sessions_leave_nothing_behind(llama: Path, swarm: LocalSwarm, connect: Connect) -> None:
    servers = swarm.servers
    model = connect(llama, join=swarm.token)
    model.swarm.run(run_sessions(model, ["finished"] * WARM_UP))
    kill_a_client(llama, swarm, 1)
    wait_for(lambda: idle(model, servers), timeout_s=30, what="the end of the warm-up")
    wait_all_free(model, servers, timeout_s=30)
    before, mine, p2pd = footprint(servers), ours(model), daemons(swarm)
    bytes_before = memory(servers)
    kinds = ["finished"] * FINISHED + ["cancelled"] * CANCELLED + ["dropped"] * DROPPED
    random.Random(SEED).shuffle(kinds)
    model.swarm.run(run_sessions(model, kinds))
    kill_a_client(llama, swarm, KILLED)
    assert len(kinds) + KILLED == 500
    wait_all_free(model, servers, timeout_s=30)
    wait_no_more(servers, before, timeout_s=30)
    wait_for(
        lambda: ours(model) == mine,
        timeout_s=30,
        what=lambda: f"this client as it was: {mine}, it is {ours(model)}",
    )
    wait_for(lambda: daemons(swarm) <= p2pd, timeout_s=30, what=lambda: f"p2pds as they were: {p2pd}, {daemons(swarm)}")
    growth = [after - was for after, was in zip(memory(servers), bytes_before, strict=True)]
    assert max(growth) < GROWTH_BYTES, growth
