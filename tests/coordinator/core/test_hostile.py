"""What one member can say must not cost the others the coordinator: it is refused, cut, or cheap."""

import json
from dataclasses import replace
from unittest.mock import patch

import pytest

from geopetals.coordinator.core import events as ev
from geopetals.coordinator.core.actions import Refused
from geopetals.coordinator.messages import (
    CacheUse,
    ChainHop,
    DecodeSample,
    Open,
    PrefillSample,
    Report,
    SessionUse,
    Span,
)
from geopetals.routing.ledger import Ledger
from tests.coordinator.core import invariants
from tests.coordinator.core.virtual_swarm import MODEL, VirtualSwarm, registration


def running_swarm(memory_bytes: int = 6_000_000) -> VirtualSwarm:
    swarm = VirtualSwarm(check=invariants.check)
    for number in range(3):
        swarm.join(f"s{number}", registration(memory_bytes=memory_bytes, block_s=0.01))
    swarm.run(15)
    assert all(swarm.serving())
    return swarm


@pytest.mark.parametrize("pin", [Span(20, 22), Span(10, 13), Span(0, 8)])
def test_a_pin_to_blocks_that_the_server_cannot_have_is_refused(pin: Span) -> None:
    swarm = running_swarm()
    swarm.tell(ev.ServerRegistered(peer="liar", register=registration(memory_bytes=6_000_000, pin=pin)))
    assert not swarm.core.knows("liar")
    assert swarm.explained[-1].what == "server refused"
    swarm.run(30)
    swarm.ask("c", "still")
    assert swarm.sessions["still"].admitted_s is not None


def test_measurements_that_overflow_are_planned_with_as_the_slowest_there_can_be() -> None:
    swarm = running_swarm(30_000_000)
    fine = registration()
    huge = (DecodeSample(1, 1, 1e308), DecodeSample(2**53, 1, 1e308))
    profile = replace(fine.profile, decode=huge, prefill=(PrefillSample(1, 1e308), PrefillSample(2**53, 1e308)))
    swarm.join("liar", replace(fine, profile=profile))
    swarm.run(30)
    swarm.ask("c", "still")
    assert "liar" not in {hop.peer_id for hop in swarm.sessions["still"].chain}


def test_nothing_of_an_event_that_failed_is_said_with_the_next_one() -> None:
    swarm = running_swarm()
    asked = ev.SessionAsked(client="c", open=_opened(swarm))
    with (
        patch.object(swarm.core.desk.books, "take", side_effect=RuntimeError),
        pytest.raises(RuntimeError),
    ):
        swarm.core.apply(asked, swarm.now)
    assert not swarm.core.apply(ev.SessionCancelled(client="x", session_id="x"), swarm.now)


def _opened(swarm: VirtualSwarm) -> Open:
    swarm.ask("c", "first")
    return replace(swarm.sessions["first"].open, session_id="second")


def test_a_session_of_any_size_is_refused_without_work_in_proportion_to_it() -> None:
    swarm = running_swarm()
    longest: list[int] = []
    real = Ledger.free_from

    def counted(self: Ledger, blocks: int) -> list[float]:
        longest.append(blocks)
        return real(self, blocks)

    most = max(capacity.pages for capacity in swarm.core.desk.books.capacity.values())  # type: ignore[union-attr]
    with patch.object(Ledger, "free_from", counted):
        refused = swarm.ask("c", "huge", prompt=1, output=2**24 - 1, batch=1024)
        assert any(isinstance(action, Refused) for action in refused)
        swarm.kill("s0")  # also while blocks are missing
        swarm.ask("c", "again", prompt=1, output=2**24 - 1, batch=1024)
    assert max(longest, default=0) <= most


def test_cache_that_cannot_be_is_not_counted() -> None:
    swarm = running_swarm()
    swarm.ask("c", "before")
    uses = tuple(SessionUse("x", 2**53, 0) for _ in range(4096))
    report = Report(
        epoch=swarm.machines["s0"].epoch,
        state="ready",
        span=swarm.machines["s0"].span,
        cache=CacheUse(total=1000, free=0, running=0, waiting=0),
        sessions=uses,
    )
    swarm.core.apply(ev.ServerReported(peer="s0", report=report), swarm.now)
    server = swarm.core.servers["s0"]
    assert server.reported == {"x": 1000}
    assert server.foreign == 1000
    assert _largest(json.loads(json.dumps(swarm.core.snapshot()))) < 2**63


def _largest(value: object) -> int:
    if isinstance(value, dict):
        return max(map(_largest, value.values()), default=0)
    if isinstance(value, list):
        return max(map(_largest, value), default=0)
    return abs(value) if isinstance(value, int) else 0


def test_registering_again_and_again_costs_neither_arrays_nor_plans() -> None:
    swarm = running_swarm()
    swarm.join("idle", registration(memory_bytes=1_000_000, max_blocks=1))
    swarm.run(60)
    again = {peer: replace(each.register, held=each.span) for peer, each in swarm.machines.items()}
    explained = len(swarm.explained)
    with patch.object(swarm.core.prices, "rebuild", side_effect=AssertionError("arrays are made anew")):
        for _ in range(20):
            for peer, register in again.items():
                swarm.tell(ev.ServerRegistered(peer=peer, register=register))
                swarm.report(swarm.machines[peer])
    assert swarm.core.placer.due is None
    swarm.run(5)
    assert len(swarm.explained) == explained
    assert all(swarm.serving())


def test_who_comes_without_blocks_again_and_again_does_not_have_plans_made_all_the_time() -> None:
    swarm = running_swarm()
    for number in range(300):
        swarm.join("liar", registration(memory_bytes=6_000_000 + number % 2))
        swarm.run(0.2)
    plans = [each for each in swarm.explained if each.at_s > swarm.now - 59 and "plan" in each.what]
    assert len(plans) <= 4


def test_resumed_sessions_on_servers_that_nobody_knows_come_to_an_end() -> None:
    swarm = running_swarm()
    chain = (ChainHop("nobody", 0, MODEL.num_blocks),)
    swarm.tell(ev.ClientSeen(client="c"))
    swarm.core.apply(
        ev.SessionResumed(client="c", session_id="made up", batch=1, max_length=64, chain=chain, tokens_used=1),
        swarm.now,
    )
    assert "made up" in swarm.core.desk.sessions
    for second in range(70):
        swarm.core.apply(ev.Tick(), swarm.now + second)
    assert "made up" not in swarm.core.desk.sessions
