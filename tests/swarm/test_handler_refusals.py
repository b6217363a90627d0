"""What a session is refused for."""

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

from geopetals.swarm.stage import Stage
from tests.swarm.handler_rig import HIDDEN, LENGTH_LIMIT, TOTAL, Server, first, play, randn

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no length": ({"max_length": None}, "max_length"),
    "no tokens": ({"max_length": 0}, "max_length"),
    "a negative length": ({"max_length": -1}, "max_length"),
    "too long a session": ({"max_length": LENGTH_LIMIT + 1}, str(LENGTH_LIMIT)),
    "a length of text": ({"max_length": "8"}, "max_length"),
    "a session id of a wrong kind": ({"session_id": 7}, "session_id"),
    "a negative wait": ({"alloc_timeout": -1}, "alloc_timeout"),
    "an endless wait": ({"alloc_timeout": float("inf")}, "alloc_timeout"),
    "a wait of text": ({"alloc_timeout": "1"}, "alloc_timeout"),
    "no time at all": ({"alloc_timeout": float("nan")}, "alloc_timeout"),
    "a structure of something else": ({"args_structure": {"a": 1}}, "args_structure|arguments"),
}


@pytest.mark.parametrize(("metadata", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_wish_is_refused(stage: Stage, metadata: dict[str, Any], words: str) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        client.send(first(client, **metadata))
        text = await client.refusal()
        assert any(word in text for word in words.split("|"))
        await server.serves_honestly()

    play(stage, scenario)


@pytest.mark.parametrize(
    ("uid", "words"),
    [
        ("", "tiny"),
        ("other.2", "tiny"),
        ("tiny", "tiny"),
        ("tiny.", "tiny"),
        ("tiny.x", "tiny"),
        ("tiny.-1", "tiny"),
        ("tiny.2.0", "tiny"),
        ("tiny.2  tiny.3", "tiny"),
        ("tiny.99999999999999999999", "tiny"),
        ("tiny.1 tiny.2", "2:5"),
        ("tiny.4 tiny.5", "2:5"),
        ("tiny.2 tiny.4", "consecutive"),
        ("tiny.4 tiny.3", "consecutive"),
        ("tiny.2 tiny.2", "consecutive"),
        ("tiny.0", "2:5"),
        ("x" * 100_000, "tiny"),
    ],
    ids=lambda value: value[:30] or "empty",
)
def test_blocks_that_are_not_served_are_refused(stage: Stage, uid: str, words: str) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        client.uid = uid
        client.send(first(client))
        text = await client.refusal()
        assert words in text
        assert len(text) < 500
        await server.serves_honestly()

    play(stage, scenario)


@pytest.mark.parametrize("hidden", [torch.zeros(2, 2), torch.zeros(1, 2, HIDDEN + 1), torch.zeros(0, 1, HIDDEN)])
def test_hidden_states_of_a_wrong_shape_are_refused(stage: Stage, hidden: Tensor) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        client.send(first(client, hidden))
        await client.refusal()
        await server.serves_honestly()

    play(stage, scenario)


def test_a_session_id_in_use_is_refused_and_its_owner_goes_on(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        owner, thief = await server.connect(session_id="s"), await server.connect(session_id="s")
        await owner.begin(8)
        thief.send(first(thief))
        assert "in use" in await thief.refusal()
        await owner.step(randn(1, 2))
        await owner.finish()

    play(stage, scenario)


def test_two_who_wait_cannot_both_get_the_same_session_id(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        holder = await server.connect()
        await holder.begin(TOTAL // 3 // 2, batch=2)
        twins = [await server.connect(session_id="s") for _ in range(2)]
        for twin in twins:
            twin.send(first(twin, alloc_timeout=30))
        await server.wait_until(lambda: server.handler.num_sessions == 3)
        await asyncio.sleep(0.05)
        await holder.finish()
        outcomes = await asyncio.gather(*(twin.receive() for twin in twins), return_exceptions=True)
        for twin in twins:
            twin.vanish()
        assert sorted(isinstance(outcome, Tensor) for outcome in outcomes) == [False, True]

    play(stage, scenario)
