"""What a server does against peers that take too much, and what it says of itself."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from prometheus_client import generate_latest

from geopetals import metrics
from geopetals.errors import GeoPetalsError, ServerFull
from geopetals.swarm import ring_session
from geopetals.swarm.limits import Limits
from geopetals.swarm.ring_messages import KEY, Opening
from geopetals.swarm.stack import DUMMY
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import HANDLER, WireError, read_message, read_metadata
from tests.swarm.handler_rig import HELD, HIDDEN, NEXT, TOTAL, Server, first, play, randn
from tests.swarm.test_handler_passes import packed
from tests.swarm.test_handler_push import pushed


def test_only_the_first_who_pushes_may_push(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect(session_id="s")
        await client.begin(8)
        await server.call("rpc_push", pushed(client.request(randn(1, 2))))
        await client.receive()
        push = server.p2p.calls[f"{HANDLER}.rpc_push"]
        with pytest.raises(WireError, match="another server"):
            await push(pushed(client.request(randn(1, 1))), SimpleNamespace(remote_id=PeerID.from_base58(NEXT)))
        await client.step(randn(1, 1))
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


@pytest.mark.parametrize("what", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_is_refused_everywhere(stage: Stage, what: float) -> None:
    async def scenario(server: Server) -> None:
        hidden = randn(1, 3)
        hidden[0, 1, 5] = what
        bad = hidden if what != 3e38 else hidden * 10
        client = await server.connect()
        client.send(first(client, bad))
        assert "not finite" in await client.refusal()
        calls = {"rpc_forward": packed(bad, DUMMY), "rpc_backward": packed(randn(1, 3), bad, DUMMY)}
        for name, request in calls.items():
            with pytest.raises(WireError, match="not finite"):
                await server.call(name, request)
        await server.serves_honestly()

    play(stage, scenario)


def test_a_pass_of_too_many_tokens_is_refused(stage: Stage) -> None:
    """Over all sequences: sessions wait for as long as it takes."""

    async def scenario(server: Server) -> None:
        with pytest.raises(WireError, match="tokens at a time"):
            await server.call("rpc_forward", packed(torch.zeros(9, 2000, HIDDEN), DUMMY))

    play(stage, scenario)


def test_a_cancelled_call_ends_with_an_exception(stage: Stage) -> None:
    """hivemind remembers calls for ever whose task ends as cancelled."""

    async def scenario(server: Server) -> None:
        task = asyncio.create_task(server.call("rpc_forward", packed(randn(1, 7), DUMMY)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(ConnectionError):
            await task

    play(stage, scenario)


def test_a_reservation_that_nobody_uses_ends(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_session, "UNUSED_S", 0.2)

    async def scenario(server: Server) -> None:
        client = await server.connect(session_id="s")
        opening = Opening(heartbeat_s=0.1, is_last=True).to_dict()
        client.send(first(client, torch.zeros(1, 0, HIDDEN), **{KEY: opening}))

        async def listen() -> None:
            while True:
                await read_message(client.reader, runtime_pb2.ExpertResponse, peer="server")

        with pytest.raises(ServerFull, match="did not get on"):
            await asyncio.wait_for(listen(), 20)
        client.writer.close()
        await server.serves_honestly()

    play(stage, scenario)


def test_a_server_says_what_is_free(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(10)
        answer = await server.call("rpc_info", runtime_pb2.ExpertUID())
        free = TOTAL - 10 * len(HELD)
        assert read_metadata(answer.serialized_info)[KEY]["cache"] == {
            "total": TOTAL,
            "free": free,
            "running": 1,
            "waiting": 0,
        }
        await client.finish()

    play(stage, scenario)


def test_too_many_sessions_of_a_peer_are_refused_and_freed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: Server) -> None:
        monkeypatch.setattr(server.handler._limits, "_limits", Limits(sessions=3))
        held = [await server.connect() for _ in range(3)]
        await server.wait_until(lambda: server.handler.num_sessions == 3)
        late = await server.connect()
        with pytest.raises(ServerFull, match="at most 3"):
            await late.receive()
        late.writer.close()
        for client in held:
            client.vanish()
        await server.wait_until(lambda: server.handler.num_sessions == 0)

    play(stage, scenario)


def test_steps_are_counted(stage: Stage) -> None:
    def value(name: str) -> float:
        return metrics.REGISTRY.get_sample_value(name) or 0.0

    async def scenario(server: Server) -> None:
        names = ["geopetals_prompt_tokens_total", "geopetals_generation_tokens_total"]
        before = [value(name) for name in names]
        client = await server.connect()
        await client.begin(8, batch=2)
        assert value("geopetals_kv_cache_reserved_block_tokens") == 16 * len(HELD)
        assert value("geopetals_num_requests_running") == 1
        await client.step(randn(2, 3))
        await client.step(randn(2, 1))
        assert [value(name) - was for name, was in zip(names, before, strict=True)] == [6, 2]
        with pytest.raises((WireError, GeoPetalsError)):
            await server.call("rpc_forward", packed(randn(1, 3)[:, :, :5], DUMMY))
        await client.finish()
        text = generate_latest(metrics.REGISTRY).decode()
        assert all(
            f'geopetals_hop_seconds_bucket{{le="0.001",stage="{stage}"}}' in text for stage in ("queue", "compute")
        )
        assert 'geopetals_requests_refused_total{reason="WireError"}' in text

    play(stage, scenario)
