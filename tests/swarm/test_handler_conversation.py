"""What a session computes, as PETALS' clients open it."""

import asyncio

import pytest
import torch

from geopetals.swarm.stage import Stage
from tests.swarm.handler_rig import HELD, Server, close_to, play, randn


@pytest.mark.parametrize("reserve_first", [True, False])
def test_a_conversation_gives_what_the_stage_gives(stage: Stage, reserve_first: bool) -> None:
    """Stock clients send the first tokens with the request for cache; ours reserves first."""
    hidden = randn(2, 8)

    async def scenario(server: Server) -> None:
        client = await server.connect(session_id="s")
        more = {} if reserve_first else {"max_length": 8}
        if reserve_first:
            await client.begin(8, batch=2)
        outputs = [await client.step(hidden[:, :5], **more)]
        assert server.budget.used == 3 * 2 * 8
        assert server.handler.num_sessions == 1
        outputs += [await client.step(hidden[:, 5:6]), await client.step(hidden[:, 6:])]
        assert close_to(torch.cat(outputs, dim=1), stage.run(hidden, HELD.start, HELD.stop))
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


def test_a_part_of_the_span_is_served_and_paid(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect(span=range(3, 4))
        found = await client.step(randn(1, 4), max_length=10)
        assert server.budget.used == 10
        assert close_to(found, stage.run(randn(1, 4), 3, 4))
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


def test_rows_are_reordered(stage: Stage) -> None:
    past, new, order = randn(3, 4), randn(3, 1, seed=1), torch.tensor([2, 2, 0])

    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.step(past, max_length=10)
        found = await client.step(new, hypo_ids=order)
        whole = stage.run(torch.cat([past[order], new], dim=1), HELD.start, HELD.stop)
        assert close_to(found, whole[:, 4:])
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


def test_sessions_do_not_disturb_each_other(stage: Stage) -> None:
    inputs = [randn(1, 6, seed=seed) for seed in range(8)]
    with torch.inference_mode():  # beforehand: a stage is for one thread at a time
        expected = [stage.run(hidden, HELD.start, HELD.stop) for hidden in inputs]

    async def talk(server: Server, seed: int) -> None:
        hidden = inputs[seed]
        client = await server.connect(session_id=f"s{seed}")
        outputs = [await client.step(hidden[:, :3], max_length=6)]
        outputs += [await client.step(hidden[:, token : token + 1]) for token in range(3, 6)]
        assert close_to(torch.cat(outputs, dim=1), expected[seed])
        await client.finish()

    async def scenario(server: Server) -> None:
        async with asyncio.TaskGroup() as group:
            for seed in range(8):
                group.create_task(talk(server, seed))

    play(stage, scenario)


def test_steps_without_ids_are_all_computed(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.step(randn(1, 2), max_length=4, step_id=None)
        again = await client.step(randn(1, 2), step_id=None)
        whole = stage.run(torch.cat([randn(1, 2)] * 2, dim=1), HELD.start, HELD.stop)
        assert close_to(again, whole[:, 2:])
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)
