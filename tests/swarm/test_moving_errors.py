"""A server that leaves its blocks says so by every way in which errors travel."""

import asyncio

import pytest
from hivemind.proto import runtime_pb2

from geopetals.errors import ServerFull, ServerMoving
from geopetals.swarm.ring_messages import KEY, Opening
from geopetals.swarm.wire import error_frame, error_from_text, read_message
from tests.event_loop import in_loop


@in_loop
async def test_on_a_stream() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(error_frame(ServerMoving("the server moves.")))
    with pytest.raises(ServerMoving, match=r"^the server moves\.$"):
        await read_message(reader, runtime_pb2.ExpertResponse, peer="12D3KooW")


def test_in_a_unary_call_as_hivemind_tells_exceptions() -> None:
    error = error_from_text(repr(ServerMoving("the server moves.")), "12D3KooW")
    assert isinstance(error, ServerMoving)
    assert "the server moves." in str(error)


def test_to_whoever_does_not_know_it_the_server_is_full() -> None:
    assert issubclass(ServerMoving, ServerFull)


@pytest.mark.parametrize("recovery", [True, False])
def test_an_opening_says_whether_it_is_a_recovery(recovery: bool) -> None:
    opening = Opening(heartbeat_s=1.0, is_last=True, recovery=recovery)
    assert Opening.read({KEY: opening.to_dict()}) == opening


def test_openings_of_earlier_versions_are_no_recoveries() -> None:
    raw = Opening(heartbeat_s=1.0, is_last=True).to_dict()
    del raw["recovery"]
    found = Opening.read({KEY: raw})
    assert found is not None
    assert not found.recovery
