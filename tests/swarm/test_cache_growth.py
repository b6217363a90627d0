import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from geopetals.errors import MemoryShortage, ServerFull
from geopetals.swarm.block_ops import StepInput
from geopetals.swarm.cache_growth import CacheGrowth
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.kv_budget import KVBudget, Reservation
from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.scheduler import Scheduler
from geopetals.swarm.stage import Stage, load_stage
from tests.in_process import CPU
from tests.models import save_llama

BLOCKS, BATCH, FIRST, LIMIT = 2, 2, 4, 1000
SPAN = range(BLOCKS)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    directory: Path = save_llama(tmp_path_factory.mktemp("growth"), layers=BLOCKS)
    return load_stage(Checkpoint.open(str(directory)), 0, BLOCKS, dtype=torch.float32, device=CPU)


class Session:
    def __init__(self, stage: Stage, budget: KVBudget, reservation: Reservation) -> None:
        self.stage, self.budget, self.reservation = stage, budget, reservation
        self.compute = ComputeThread(asyncio.get_running_loop())
        self.kv: SessionKV = stage.allocate_kv(0, BLOCKS, batch=BATCH, max_length=FIRST)
        self.growth = CacheGrowth(self.kv, reservation, self.compute, limit=LIMIT)

    async def step(self, hidden: torch.Tensor) -> torch.Tensor:
        await self.growth.make_room(hidden.shape[1])
        step = StepInput(hidden=hidden, prompts=None, hypo_ids=None)
        return await Scheduler(self.stage, self.compute).infer(self.kv, SPAN, step)

    @property
    def reserved_tokens(self) -> int:
        return self.reservation.amount // (BLOCKS * BATCH)


def with_session(stage: Stage, total_tokens: int, scenario: Callable[[Session], Awaitable[None]]) -> None:
    async def main() -> None:
        budget = KVBudget(total_tokens * BLOCKS * BATCH)
        async with asyncio.timeout(30), budget.reserve(FIRST * BLOCKS * BATCH, timeout_s=0.0) as reservation:
            session = Session(stage, budget, reservation)
            try:
                await scenario(session)
            finally:
                session.compute.stop()
                assert await asyncio.to_thread(session.compute.join, 10.0)
        assert budget.left == budget.total

    asyncio.run(main())


def test_a_session_that_grew_computes_what_one_that_was_large_does(stage: Stage) -> None:
    async def scenario(session: Session) -> None:
        pieces = torch.randn(BATCH, 40, stage.hidden_size, generator=torch.Generator().manual_seed(0)).split(
            [3, 1, 1, 20, 1, 14], dim=1
        )
        large = stage.allocate_kv(0, BLOCKS, batch=BATCH, max_length=40)
        for piece in pieces:
            expected = stage.run(piece, 0, BLOCKS, kv=large)
            assert torch.allclose(await session.step(piece), expected, rtol=1e-5, atol=1e-5)
        assert session.kv.max_length == session.reserved_tokens == FIRST + 256

    with_session(stage, LIMIT, scenario)


def test_a_step_that_fits_reserves_nothing(stage: Stage) -> None:
    async def scenario(session: Session) -> None:
        await session.growth.make_room(FIRST)
        assert session.kv.max_length == session.reserved_tokens == FIRST

    with_session(stage, LIMIT, scenario)


def test_growth_is_as_much_as_is_free_or_refused(stage: Stage) -> None:
    async def scenario(session: Session) -> None:
        await session.growth.make_room(30)
        assert session.kv.max_length == session.reserved_tokens == 30
        with pytest.raises(ServerFull, match="block-tokens"):
            await session.growth.make_room(31)
        assert session.kv.max_length == session.reserved_tokens == 30

    with_session(stage, 30, scenario)


def test_no_session_is_longer_than_the_server_allows(stage: Stage) -> None:
    async def scenario(session: Session) -> None:
        with pytest.raises(ServerFull, match="at most 1000 tokens"):
            await session.growth.make_room(LIMIT + 1)
        assert session.reserved_tokens == FIRST

    with_session(stage, 2 * LIMIT, scenario)


def test_memory_that_is_not_there_is_not_kept_reserved(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(session: Session) -> None:
        def fail(length: int) -> None:
            raise MemoryShortage("it does not fit")

        monkeypatch.setattr(session.kv, "grow", fail)
        with pytest.raises(ServerFull, match="does not fit"):
            await session.growth.make_room(100)
        assert session.reserved_tokens == FIRST

    with_session(stage, LIMIT, scenario)
