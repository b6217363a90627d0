import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.proto import runtime_pb2
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from geopetals.errors import ServerMoving
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.scheduler import Scheduler
from geopetals.swarm.server_session import Push, ServerSession, SessionRequest, read_session_request, read_uids
from geopetals.swarm.stack import DUMMY, DUMMY_INT64, pack_args_kwargs
from geopetals.swarm.stage import Stage, load_stage
from geopetals.swarm.wire import UNARY_LIMIT_BYTES, WireError, deserialize, read_metadata, serialize, write_metadata
from tests.models import save_llama

HIDDEN, SWARM, SERVED = 64, "tiny", range(2)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    directory: Path = save_llama(tmp_path_factory.mktemp("session"), layers=2)
    return load_stage(Checkpoint.open(str(directory)), 0, 2, dtype=torch.float32, device=torch.device("cpu"))


def request(tokens: int, *, batch: int = 1, step_id: str | None = None, **metadata: Any) -> runtime_pb2.ExpertRequest:
    hidden = torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    tensors, structure = pack_args_kwargs(hidden, DUMMY, DUMMY_INT64)
    more = {"step_id": step_id, "args_structure": structure, "max_length": 64, **metadata}
    return runtime_pb2.ExpertRequest(
        uid="tiny.0 tiny.1", tensors=[serialize(tensor) for tensor in tensors], metadata=write_metadata(more)
    )


class Session:
    """A session on its own, with what it answers and pushes."""

    def __init__(self, stage: Stage, compute: ComputeThread, *, batch: int = 1, max_length: int = 64) -> None:
        self.answers: list[Tensor] = []
        self.pushes: list[Push] = []
        wish = read_session_request(
            request(1, batch=batch, max_length=max_length), served=SERVED, swarm=SWARM, length_limit=10**5
        )
        self.kv = stage.allocate_kv(0, 2, batch=batch, max_length=max_length)
        self.session = ServerSession(
            wish,
            self.kv,
            stage=stage,
            scheduler=Scheduler(stage, compute),
            swarm=SWARM,
            respond=self._respond,
            push=self.pushes.append,
        )

    def _respond(self, data: bytes) -> None:
        self.answers.append(deserialize(runtime_pb2.ExpertResponse.FromString(data[9:]).tensors[0]))


def play(scenario: Callable[[ComputeThread], Any]) -> None:
    async def main() -> None:
        compute = ComputeThread(asyncio.get_running_loop())
        try:
            async with asyncio.timeout(30):
                await scenario(compute)
        finally:
            compute.stop()
            assert await asyncio.to_thread(compute.join, 10.0)

    asyncio.run(main())


def test_a_wish_is_read() -> None:
    wish = read_session_request(
        request(3, batch=4, session_id="s", alloc_timeout=2), served=SERVED, swarm=SWARM, length_limit=64
    )
    assert isinstance(wish, SessionRequest)
    assert (wish.span, wish.batch, wish.max_length) == (range(2), 4, 64)
    assert (wish.session_id, wish.alloc_timeout_s, wish.block_tokens) == ("s", 2.0, 2 * 4 * 64)


@given(st.integers(0, 20), st.integers(1, 20), st.integers(0, 20), st.integers(1, 20))
def test_blocks_are_read_exactly_if_they_are_served(start: int, count: int, first: int, held: int) -> None:
    asked, served = range(start, start + count), range(first, first + held)
    text = " ".join(f"{SWARM}.{block}" for block in asked)
    if asked.start >= served.start and asked.stop <= served.stop:
        assert read_uids(text, served=served, swarm=SWARM) == asked
    else:
        with pytest.raises(ServerMoving):  # who asks knows where the server was before
            read_uids(text, served=served, swarm=SWARM)


@given(st.text(max_size=40))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    try:
        assert read_uids(text, served=range(5), swarm=SWARM).stop <= 5
    except (WireError, ServerMoving):
        return


def test_a_step_id_counts_once_and_in_order(stage: Stage) -> None:
    async def scenario(compute: ComputeThread) -> None:
        one = Session(stage, compute)
        steps = [request(2, step_id="a"), request(2, step_id="a"), request(1, step_id="b"), request(2, step_id="a")]
        await asyncio.gather(*(one.session.step(step) for step in steps))
        assert [answer.shape[1] for answer in one.answers] == [2, 1]
        assert one.kv.length == 3

    play(scenario)


def test_a_step_that_failed_may_come_again(stage: Stage) -> None:
    async def scenario(compute: ComputeThread) -> None:
        one = Session(stage, compute)
        with pytest.raises(WireError):
            await one.session.step(request(65, step_id="a"))
        await one.session.step(request(2, step_id="a"))
        assert one.kv.length == 2

    play(scenario)


def test_late_copies_are_known_for_long(stage: Stage) -> None:
    async def scenario(compute: ComputeThread) -> None:
        one = Session(stage, compute)
        for number in range(30):
            await one.session.step(request(1, step_id=f"{number}"))
        for number in range(30):
            await one.session.step(request(1, step_id=f"{number}"))
        assert one.kv.length == len(one.answers) == 30

    play(scenario)


@pytest.mark.parametrize("step_id", [7, 1.5, b"x", ["a"], {"a": 1}, True])
def test_a_step_id_may_be_anything(stage: Stage, step_id: object) -> None:
    async def scenario(compute: ComputeThread) -> None:
        one = Session(stage, compute)
        for _ in range(2):
            await one.session.step(request(1, step_id=step_id))  # type: ignore[arg-type]
        assert one.kv.length == 1

    play(scenario)


def test_a_chain_is_followed_hop_by_hop(stage: Stage) -> None:
    async def scenario(compute: ComputeThread) -> None:
        one = Session(stage, compute)
        chain = [("B", "at B", 2, 4), ("C", "at C", 4, 6)]
        await one.session.step(request(2, step_id="a", next_servers=chain))
        (push,) = one.pushes
        assert (push.peer_id, push.request.uid) == ("B", "tiny.2 tiny.3")
        metadata = read_metadata(push.request.metadata)
        assert (metadata["session_id"], metadata["step_id"], metadata["pushed"]) == ("at B", "a", True)
        assert [tuple(hop) for hop in metadata["next_servers"]] == [chain[1]]
        assert torch.equal(deserialize(push.request.tensors[0]), one.answers[0])

    play(scenario)


def test_what_a_unary_call_cannot_carry_is_not_pushed(stage: Stage) -> None:
    async def scenario(compute: ComputeThread) -> None:
        tokens = UNARY_LIMIT_BYTES // (HIDDEN * 4) // 64 + 1
        one = Session(stage, compute, batch=64, max_length=tokens + 1)
        chain = [("B", "at B", 2, 4)]
        await one.session.step(request(tokens, batch=64, next_servers=chain))
        assert one.pushes == []
        await one.session.step(request(1, batch=64, next_servers=chain))
        assert len(one.pushes) == 1

    play(scenario)


def test_a_pushed_copy_is_not_pushed_on_twice(stage: Stage) -> None:
    async def scenario(compute: ComputeThread) -> None:
        one = Session(stage, compute)
        step = request(2, step_id="a", next_servers=[("B", "at B", 2, 4)])
        await one.session.step(step)
        await one.session.step(step)
        assert len(one.pushes) == 1

    play(scenario)
