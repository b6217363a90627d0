"""Steps of many sessions at once give what each gives alone; who waits for whom is decided here."""

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from geopetals.swarm.block_ops import StepInput
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.compute import ComputeThread, Priority
from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.scheduler import MOST_ROWS, PIECE_TOKENS, Scheduler
from geopetals.swarm.stage import Stage, load_stage
from geopetals.swarm.wire import WireError
from tests.batches import Twins
from tests.families import save_tiny, tiny_config
from tests.in_process import CPU

EXACT = 1e-5
WHOLE, PART = range(6), range(2, 5)
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    directory: Path = tmp_path_factory.mktemp("gemma")
    save_tiny(directory, tiny_config("gemma3_text"))  # some blocks with a sliding window
    return load_stage(Checkpoint.open(str(directory)), 0, 6, dtype=torch.float32, device=CPU)


class Desk:
    """A scheduler, with a way to keep the compute thread busy while steps arrive."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.compute = ComputeThread(asyncio.get_running_loop())
        self.scheduler = Scheduler(stage, self.compute)

    def twins(self, length: int, *, batch: int = 1, span: range = WHOLE, seed: int = 0) -> Twins:
        twins = Twins(self.stage, span, batch=batch, max_length=length + 40, seed=seed)
        twins.prefill(length)
        return twins

    async def step(self, twins: Twins, *, tokens: int = 1, span: range = WHOLE, **more: Any) -> float:
        """A step through the scheduler, and how far it is from the same step alone."""
        hidden = twins.hidden(tokens)
        out = await self.scheduler.infer(twins.together, span, step_of(hidden, **more))
        if "hypo_ids" in more:
            twins.alone.reorder(more["hypo_ids"])
        expected = await self.compute.run(lambda: self.stage.run(hidden, span.start, span.stop, kv=twins.alone))
        return float((out - expected).abs().max() / expected.abs().max())

    async def all_at_once(self, *steps: Awaitable[float]) -> None:
        """The steps arrive while the thread is busy with something else."""
        started, go_on = threading.Event(), threading.Event()
        busy = asyncio.create_task(self.compute.run(lambda: (started.set(), go_on.wait(DEADLINE_S))))
        assert await asyncio.to_thread(started.wait, DEADLINE_S)
        tasks = [asyncio.ensure_future(step) for step in steps]
        await asyncio.sleep(0)
        go_on.set()
        await busy
        assert max(await asyncio.gather(*tasks)) < EXACT


def step_of(hidden: Tensor, *, prompts: Tensor | None = None, hypo_ids: Tensor | None = None) -> StepInput:
    return StepInput(hidden=hidden, prompts=prompts, hypo_ids=hypo_ids)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def at_a_desk(stage: Stage, scenario: Callable[[Desk], Awaitable[None]]) -> None:
    async def main() -> None:
        desk = Desk(stage)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await scenario(desk)
        finally:
            desk.compute.stop()
            assert await asyncio.to_thread(desk.compute.join, DEADLINE_S)

    asyncio.run(main())


def test_steps_that_wait_are_one_batch(stage: Stage) -> None:
    async def scenario(desk: Desk) -> None:
        sessions = [desk.twins(length, batch=1 + length % 2, seed=length) for length in (1, 4, 30, 9, 12)]
        for _ in range(3):
            await desk.all_at_once(*(desk.step(twins) for twins in sessions))
        assert desk.scheduler.batch_sizes == {5: 3}

    at_a_desk(stage, scenario)


class SlowStage:
    """A stage whose passes take a while, whatever they compute."""

    def __init__(self, stage: Stage, takes_s: float) -> None:
        self._stage, self._takes_s = stage, takes_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def run(self, *args: Any, **options: Any) -> Tensor:
        time.sleep(self._takes_s)
        return self._stage.run(*args, **options)

    def decode(self, *args: Any) -> Tensor:
        time.sleep(self._takes_s)
        return self._stage.decode(*args)


def test_sessions_that_take_turns_come_to_be_one_batch(stage: Stage) -> None:
    """Each sends its next step soon after the answer: without the window they would take turns for ever."""

    async def scenario(desk: Desk) -> None:
        sizes, sessions = desk.scheduler.batch_sizes, [desk.twins(30, seed=seed) for seed in range(3)]
        first_answered = asyncio.Event()

        async def decode(twins: Twins) -> None:
            while sizes[3] < 5:
                await desk.scheduler.infer(twins.together, WHOLE, step_of(twins.hidden(1)))
                first_answered.set()
                await asyncio.sleep(0.02)

        first = asyncio.ensure_future(decode(sessions[0]))
        await first_answered.wait()
        await asyncio.gather(first, *map(decode, sessions[1:]))

    at_a_desk(cast(Stage, SlowStage(stage, 0.1)), scenario)


def test_other_blocks_are_other_batches(stage: Stage) -> None:
    async def scenario(desk: Desk) -> None:
        whole = [desk.twins(length, seed=length) for length in (3, 5)]
        part = [desk.twins(length, span=PART, seed=length) for length in (4, 9, 6)]
        await desk.all_at_once(*(desk.step(one) for one in whole), *(desk.step(one, span=PART) for one in part))
        assert desk.scheduler.batch_sizes == {2: 1, 3: 1}

    at_a_desk(stage, scenario)


def test_a_batch_has_so_many_rows_at_most(stage: Stage) -> None:
    async def scenario(desk: Desk) -> None:
        sessions = [desk.twins(2, batch=MOST_ROWS // 2, seed=seed) for seed in range(3)]
        await desk.all_at_once(*(desk.step(one) for one in sessions))
        assert desk.scheduler.batch_sizes == {2: 1, 1: 1}

    at_a_desk(stage, scenario)


@pytest.mark.parametrize(("layout", "sizes"), [("padded", {3: 1, 1: 1}), ("rows", {4: 1})])
def test_short_sessions_are_not_filled_up_to_a_long_one(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, layout: str, sizes: dict[int, int]
) -> None:
    monkeypatch.setattr("geopetals.swarm.scheduler.FREE_PADDED_TOKENS", 50)
    monkeypatch.setattr(stage.batching, "layout", layout)

    async def scenario(desk: Desk) -> None:
        sessions = [desk.twins(length, seed=length) for length in (4, 5, 90, 6)]
        await desk.all_at_once(*(desk.step(twins) for twins in sessions))
        assert desk.scheduler.batch_sizes == sizes

    at_a_desk(stage, scenario)


def test_long_steps_prompts_and_beams_beside_decoding(stage: Stage) -> None:
    async def scenario(desk: Desk) -> None:
        sessions = [desk.twins(length, seed=length) for length in (3, 8)]
        beams, chunk = desk.twins(6, batch=3), desk.twins(1, seed=5)
        order = torch.tensor([2, 0, 0])
        await desk.all_at_once(
            desk.step(sessions[0]),
            desk.step(chunk, tokens=30),
            desk.step(beams, hypo_ids=order),
            desk.step(sessions[1]),
        )
        assert desk.scheduler.batch_sizes == {2: 1, 1: 1}

    at_a_desk(stage, scenario)


def test_nobody_holds_the_cache_of_beams_that_are_done(stage: Stage) -> None:
    async def scenario(desk: Desk) -> None:
        kv = stage.allocate_kv(0, 6, batch=2, max_length=4)
        hidden = torch.zeros(2, 1, stage.hidden_size)
        await desk.scheduler.infer(kv, WHOLE, step_of(hidden, hypo_ids=torch.tensor([1, 1])))
        cache = weakref.ref(kv)
        del kv
        await desk.compute.run(lambda: None)  # the thread has let go of the step, too
        await asyncio.sleep(0)
        gc.collect()
        assert cache() is None

    at_a_desk(stage, scenario)


def test_prompts_go_with_the_first_piece(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(desk: Desk) -> None:
        prompts = torch.randn(6, 1, 7, stage.hidden_size, generator=torch.Generator().manual_seed(3))
        hidden = torch.randn(2, 20, stage.hidden_size, generator=torch.Generator().manual_seed(4))
        results = []
        for tokens in (8, 10**6):
            monkeypatch.setattr("geopetals.swarm.scheduler.PIECE_TOKENS", tokens)
            kv = stage.allocate_kv(0, 6, batch=2, max_length=20)
            results.append(await desk.scheduler.infer(kv, WHOLE, step_of(hidden, prompts=prompts)))
            assert kv.length == 20
        assert torch.allclose(*results, rtol=EXACT, atol=EXACT * float(results[0].abs().max()))

    at_a_desk(stage, scenario)


def test_a_long_prefill_lets_decode_steps_go_between_its_pieces(stage: Stage) -> None:
    """Each piece of 256 tokens is followed by the decode step that waits; two prefills take turns."""

    async def scenario(desk: Desk) -> None:
        ran: list[tuple[str, int]] = []
        names: dict[int, str] = {}
        run = desk.stage.run

        def noted(hidden: Tensor, start: int, end: int, *, kv: SessionKV | None = None) -> Tensor:
            ran.append((names[id(kv)], hidden.shape[1]))
            if hidden.shape[1] > 1:
                wait_for(lambda: not desk.scheduler._arrived.empty())
            return run(hidden, start, end, kv=kv)

        caches = {}
        for name in ("a", "b", "decoder"):
            caches[name] = stage.allocate_kv(0, 6, batch=1, max_length=5 * PIECE_TOKENS)
            names[id(caches[name])] = name
        monkey = pytest.MonkeyPatch()
        monkey.setattr(desk.stage, "run", noted)
        try:
            prompt = torch.zeros(1, 3 * PIECE_TOKENS, stage.hidden_size)
            prefills = [
                asyncio.create_task(desk.scheduler.infer(caches[name], WHOLE, step_of(prompt))) for name in ("a", "b")
            ]
            while not all(prefill.done() for prefill in prefills):
                await desk.scheduler.infer(caches["decoder"], WHOLE, step_of(prompt[:, :1]))
            await asyncio.gather(*prefills)
        finally:
            monkey.undo()
        pieces = [name for name, tokens in ran if tokens > 1]
        assert pieces == ["a", "b"] * 3
        assert all(tokens in (1, PIECE_TOKENS) for _, tokens in ran)
        places = [number for number, (_, tokens) in enumerate(ran) if tokens > 1]
        assert all(later - earlier > 1 for earlier, later in itertools.pairwise(places))

    at_a_desk(stage, scenario)


def test_decode_steps_do_not_starve_a_prefill(stage: Stage) -> None:
    async def scenario(desk: Desk) -> None:
        order: list[str] = []
        started, go_on = threading.Event(), threading.Event()
        busy = asyncio.create_task(desk.compute.run(lambda: (started.set(), go_on.wait(DEADLINE_S))))
        assert await asyncio.to_thread(started.wait, DEADLINE_S)
        jobs = [("prefill", Priority.PREFILL)] * 2 + [("decode", Priority.INFERENCE)] * 4
        tasks = [
            asyncio.create_task(desk.compute.run(lambda name=name: order.append(name), priority))
            for name, priority in jobs
        ]
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(busy, *tasks)
        assert order == ["decode", "prefill", "decode", "prefill", "decode", "decode"]

    at_a_desk(stage, scenario)


def test_what_does_not_fit_is_refused_before_anything_is_computed(stage: Stage) -> None:
    async def scenario(desk: Desk) -> None:
        kv = stage.allocate_kv(0, 6, batch=1, max_length=5)
        for tokens, batch in ((6, 1), (1, 2)):
            with pytest.raises(WireError):
                await desk.scheduler.infer(kv, WHOLE, step_of(torch.zeros(batch, tokens, stage.hidden_size)))
        assert kv.length == 0

    at_a_desk(stage, scenario)


def test_a_batch_that_fails_is_computed_one_by_one(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(desk: Desk) -> None:
        sessions = [desk.twins(length, seed=length) for length in (3, 8, 5)]

        def fail(*_: Any) -> Tensor:
            raise RuntimeError("the batch is too large")

        monkeypatch.setattr(desk.stage, "decode", fail)
        await desk.all_at_once(*(desk.step(one) for one in sessions))
        monkeypatch.undo()
        await desk.all_at_once(*(desk.step(one) for one in sessions))

    at_a_desk(stage, scenario)


def test_an_error_is_its_own_sessions_alone(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(desk: Desk) -> None:
        good = [desk.twins(length, seed=length) for length in (3, 8)]
        bad = stage.allocate_kv(2, 4, batch=1, max_length=9)  # not for the blocks that are asked for
        failing = asyncio.create_task(desk.scheduler.infer(bad, WHOLE, step_of(torch.zeros(1, 1, stage.hidden_size))))
        await desk.all_at_once(*(desk.step(one) for one in good))
        with pytest.raises(Exception, match="cache is for blocks 2:4"):
            await failing

    at_a_desk(stage, scenario)


def test_a_step_nobody_waits_for_any_more_is_dropped(stage: Stage) -> None:
    async def scenario(desk: Desk) -> None:
        sessions = [desk.twins(length, seed=length) for length in (3, 8)]
        left = stage.allocate_kv(0, 6, batch=1, max_length=9)

        async def leave() -> float:
            task = asyncio.create_task(desk.scheduler.infer(left, WHOLE, step_of(torch.zeros(1, 1, stage.hidden_size))))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return 0.0

        await desk.all_at_once(leave(), *(desk.step(one) for one in sessions))
        assert left.length == 0
        assert desk.scheduler.batch_sizes == {2: 1}

    at_a_desk(stage, scenario)


def test_where_batches_are_not_exact_steps_are_computed_one_by_one(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(desk: Desk) -> None:
        monkeypatch.setattr(desk.stage.batching, "layout", None)
        sessions = [desk.twins(length, seed=length) for length in (3, 8, 5)]
        await desk.all_at_once(*(desk.step(one) for one in sessions))
        assert desk.scheduler.batch_sizes == {1: 3}

    at_a_desk(stage, scenario)
