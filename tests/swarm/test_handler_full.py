"""When the cache is full, or the server fails."""

import asyncio
import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from geopetals.errors import MemoryShortage, ServerBroken, ServerFull
from geopetals.swarm.stage import Stage
from tests.swarm.handler_rig import HIDDEN, LENGTH_LIMIT, TOTAL, Server, first, play, randn


def test_a_full_server_says_so_at_once(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        holder, late = await server.connect(), await server.connect()
        await holder.begin(TOTAL // 3 // 2, batch=2)
        late.send(first(late))
        with pytest.raises(ServerFull, match="0 are free"):
            await late.receive()
        await late.closed()
        await holder.finish()
        await server.serves_honestly()

    play(stage, scenario)


def test_a_session_that_can_never_fit_does_not_wait(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        client.send(first(client, randn(2, 1), max_length=LENGTH_LIMIT, alloc_timeout=600))
        with pytest.raises(ServerFull, match=f"this server has {TOTAL}"):
            await client.receive()
        await client.closed()

    play(stage, scenario)


def test_who_waits_gets_the_cache_that_comes_free(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        holder, late = await server.connect(), await server.connect()
        await holder.begin(TOTAL // 3 // 2, batch=2)
        late.send(first(late, alloc_timeout=30))
        await server.wait_until(lambda: server.handler.num_sessions == 2)
        await holder.finish()
        assert (await late.receive()).shape == (1, 2, HIDDEN)
        await late.finish()

    play(stage, scenario)


def test_who_waits_too_long_is_told_that_the_server_is_full(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        holder, late = await server.connect(), await server.connect()
        await holder.begin(TOTAL // 3 // 2, batch=2)
        late.send(first(late, alloc_timeout=0.05))
        with pytest.raises(ServerFull):
            await late.receive()
        await late.closed()
        await holder.finish()

    play(stage, scenario)


def test_a_waiting_client_that_vanishes_does_not_hold_up_others(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        holder, gone = await server.connect(), await server.connect()
        await holder.begin(TOTAL // 3 // 2 - 5, batch=2)
        gone.send(first(gone, max_length=LENGTH_LIMIT, alloc_timeout=600))
        await server.wait_until(lambda: server.handler.num_sessions == 2)
        await asyncio.sleep(0.05)
        gone.vanish()
        late = await server.connect()
        late.send(first(late, alloc_timeout=2))
        with contextlib.suppress(ServerFull):
            assert (await late.receive()).shape == (1, 2, HIDDEN)
            await late.finish()
            await holder.finish()
            return
        holder.vanish()
        pytest.fail("a client that was gone kept its place in the queue")

    play(stage, scenario)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryShortage("send fewer.")])
def test_a_device_without_memory_is_a_full_server(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(8)
        monkeypatch.setattr(stage, "run", out_of_memory)
        client.send(client.request(randn(1, 2)))
        with pytest.raises(ServerFull):
            await client.receive()
        await client.closed()
        monkeypatch.undo()
        await server.serves_honestly()

    def out_of_memory(*_: Any, **__: Any) -> Tensor:
        raise error

    play(stage, scenario)


def test_a_fault_of_the_server_is_told_without_details(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(8)
        monkeypatch.setattr(stage, "run", fail)
        client.send(client.request(randn(1, 2)))
        with pytest.raises(ServerBroken, match="internal error: RuntimeError") as caught:
            await client.receive()
        await client.closed()
        assert "secret" not in str(caught.value)
        monkeypatch.undo()
        await server.serves_honestly()

    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("secret path")

    play(stage, scenario)
