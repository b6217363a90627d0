"""PETALS' push: a step comes from the client and from the previous server."""

import asyncio
from typing import Any

import pytest
import torch
from hivemind.proto import runtime_pb2

from geopetals.errors import GeoPetalsError
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import (
    HANDLER,
    WireError,
    deserialize,
    read_metadata,
    write_metadata,
)
from tests.swarm.handler_rig import HELD, NEXT, PEER, Server, close_to, play, randn


def pushed(request: runtime_pb2.ExpertRequest) -> runtime_pb2.ExpertRequest:
    """The same step as the previous server sends it."""
    copy = runtime_pb2.ExpertRequest.FromString(request.SerializeToString())
    copy.metadata = write_metadata({**read_metadata(request.metadata), "pushed": True})
    return copy


@pytest.mark.parametrize("order", ["push first", "push last", "both at once", "push twice", "push alone"])
def test_a_step_is_answered_once_however_it_comes(stage: Stage, order: str) -> None:
    hidden = randn(1, 5)

    async def scenario(server: Server) -> None:
        client = await server.connect(session_id="s")
        await client.begin(8)
        request = client.request(hidden[:, :3])
        push = pushed(request)
        if order in ("push first", "push twice", "push alone"):
            await server.call("rpc_push", push)
        if order == "push twice":
            await server.call("rpc_push", push)
        if order == "both at once":
            client.send(request)
            await asyncio.gather(server.call("rpc_push", push), client.writer.drain())
        elif order != "push alone":
            client.send(request)
        found = await client.receive()
        if order == "push last":
            await server.call("rpc_push", push)
        rest = await client.step(hidden[:, 3:])
        whole = stage.run(hidden, HELD.start, HELD.stop)
        assert close_to(torch.cat([found, rest], dim=1), whole)
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


@pytest.mark.parametrize("metadata", [{"session_id": "nobody"}, {}, {"session_id": None}, {"session_id": [1]}])
def test_a_push_to_nobody_is_ignored(stage: Stage, metadata: dict[str, Any]) -> None:
    async def scenario(server: Server) -> None:
        answer = await server.call("rpc_push", runtime_pb2.ExpertRequest(metadata=write_metadata(metadata)))
        assert answer == runtime_pb2.ExpertResponse()

    play(stage, scenario)


def test_a_wrong_push_hurts_its_sender_only(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect(session_id="s")
        await client.begin(8)
        for wrong in (client.request(randn(2, 1)), client.request(randn(1, 100))):
            with pytest.raises((WireError, GeoPetalsError)):
                await server.call("rpc_push", pushed(wrong))
        found = await client.step(randn(1, 3))
        assert close_to(found, stage.run(randn(1, 3), HELD.start, HELD.stop))
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


def test_outputs_go_to_the_next_server_under_the_name_the_client_gave(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect(session_id="s")
        await client.begin(8)
        chain = [(NEXT, "session there", 5, 8), (PEER.to_base58(), "session after", 8, 9)]
        order = torch.tensor([0])
        found = await client.step(randn(1, 3), next_servers=chain, step_id="seven", hypo_ids=order)
        await server.wait_until(lambda: len(server.p2p.pushed) == 1)
        ((peer_id, name, request),) = server.p2p.pushed
        assert (peer_id, name, request.uid) == (NEXT, f"{HANDLER}.rpc_push", "tiny.5 tiny.6 tiny.7")
        metadata = read_metadata(request.metadata)
        assert metadata["session_id"] == "session there"
        assert metadata["step_id"] == "seven"
        assert metadata["pushed"] is True
        assert [list(hop) for hop in metadata["next_servers"]] == [list(chain[1])]
        assert torch.equal(deserialize(request.tensors[0]), found)
        assert torch.equal(deserialize(request.tensors[2]), order)
        await client.step(randn(1, 1))
        await client.finish()
        assert len(server.p2p.pushed) == 1

    play(stage, scenario)


def test_a_push_that_fails_costs_nothing(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        server.p2p.push_error = ConnectionError("gone")
        client = await server.connect(session_id="s")
        await client.begin(8)
        for _ in range(2):
            await client.step(randn(1, 1), next_servers=[(NEXT, "there", 5, 8)])
        await client.step(randn(1, 1), next_servers=[("no peer id", "there", 5, 8)])
        await server.wait_until(lambda: len(server.p2p.pushed) == 2)
        await client.finish()

    play(stage, scenario)


@pytest.mark.parametrize(
    "chain",
    [
        5,
        "text",
        {"a": 1},
        {0: [NEXT, "s", 0, 1]},
        [1],
        ["abcd"],
        [[NEXT]],
        [[NEXT, "s", "a", "b"]],
        [[NEXT, "s", None, 1]],
        [[NEXT, "s", float("inf"), 1]],
        [[NEXT, "s", float("nan"), 1]],
    ],
    ids=repr,
)
def test_a_wrong_chain_is_refused(stage: Stage, chain: object, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(8)
        client.send(client.request(randn(1, 1), next_servers=chain))
        text = await client.refusal()
        assert "internal error" not in text
        await server.serves_honestly()

    play(stage, scenario)
    assert "Traceback" not in caplog.text


def test_an_endless_chain_is_not_spelt_out(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(8)
        await client.step(randn(1, 1), next_servers=[(NEXT, "s", 0, 10**9)])
        await server.wait_until(lambda: len(server.p2p.pushed) == 1)
        assert len(server.p2p.pushed[0][2].uid) < 100_000
        await client.finish()

    play(stage, scenario)
