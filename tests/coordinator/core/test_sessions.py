"""Sessions that grow, come back after a loss of the channel, stand still, or lie."""

import pytest

from geopetals.coordinator.core import Core, Settings
from geopetals.coordinator.core import actions as act
from geopetals.coordinator.core import events as ev
from geopetals.coordinator.core.planner import make_plan
from geopetals.coordinator.messages import ChainHop, Span
from tests.coordinator.core import invariants
from tests.coordinator.core.virtual_swarm import MODEL, VirtualSwarm, registration


def small_swarm(settings: Settings | None = None) -> VirtualSwarm:
    swarm = VirtualSwarm(settings=settings or Settings(page_tokens=8), check=invariants.check)
    for number in range(3):
        swarm.join(f"s{number}", registration(memory_bytes=6_000_000, block_s=0.01))
    swarm.run(15)
    swarm.noise = 1000.0
    return swarm


def held(swarm: VirtualSwarm) -> int:
    assert swarm.core.desk.books is not None
    return sum(swarm.core.desk.books.held)


def test_a_session_grows_where_there_is_room_and_not_otherwise() -> None:
    swarm = small_swarm()
    swarm.ask("c", "one", prompt=32, output=32)
    before = held(swarm)
    (longer,) = swarm.tell(ev.SessionExtended(client="c", session_id="one", max_length=128))
    assert isinstance(longer, act.Admitted)
    assert longer.max_tokens == 128
    assert held(swarm) == 2 * before
    for number in range(3):
        swarm.ask("c", f"more{number}", prompt=64, output=32)
    (no,) = swarm.tell(ev.SessionExtended(client="c", session_id="one", max_length=450))
    assert isinstance(no, act.Refused)
    (never,) = swarm.tell(ev.SessionExtended(client="c", session_id="one", max_length=10**6))
    assert isinstance(never, act.Refused)
    assert not swarm.tell(ev.SessionExtended(client="thief", session_id="one", max_length=100))


def test_a_session_that_nobody_remembers_is_booked_when_its_client_comes_back() -> None:
    swarm = small_swarm()
    swarm.ask("c", "one", prompt=32, output=32)
    chain, before = swarm.sessions["one"].chain, held(swarm)
    for _ in range(2):
        swarm.tell(ev.SessionResumed(client="c", session_id="old", batch=1, max_length=64, chain=chain, tokens_used=40))
    assert held(swarm) == 2 * before
    swarm.tell(ev.SessionClosed(client="c", session_id="old"))
    assert held(swarm) == before


def test_sessions_that_a_client_comes_back_without_are_over() -> None:
    swarm = small_swarm()
    for name in ("kept", "lost"):
        swarm.ask("c", name, prompt=32, output=32)
    swarm.ask("d", "another's", prompt=32, output=32)
    each, since_s = held(swarm) // 3, swarm.now + 0.5
    swarm.run(1)
    swarm.ask("c", "new", prompt=32, output=32)
    swarm.tell(ev.SessionsHeld(client="c", sessions=("kept", "another's"), asked_before_s=since_s))
    assert set(swarm.core.desk.sessions) == {"kept", "another's", "new"}
    assert held(swarm) == 3 * each
    assert swarm.sessions["lost"].ended


def test_a_session_that_moved_is_booked_where_it_is() -> None:
    swarm = VirtualSwarm(check=invariants.check)
    for number in range(4):
        swarm.join(f"s{number}", registration(memory_bytes=30_000_000, max_blocks=6))
    swarm.run(20)
    swarm.noise = 1000.0
    swarm.ask("c", "one")
    chain, books = swarm.sessions["one"].chain, swarm.core.desk.books
    assert books is not None
    used = {hop.peer_id for hop in chain}
    spare = {peer: swarm.machines[peer].span for peer in swarm.machines if peer not in used}
    moved = tuple(
        ChainHop(
            next((peer for peer, span in spare.items() if span == Span(hop.start, hop.end)), hop.peer_id), *hop[1:]
        )
        for hop in chain
    )
    assert moved != chain
    swarm.tell(ev.SessionResumed(client="c", session_id="one", batch=1, max_length=64, chain=moved, tokens_used=40))
    now_used = {peer for peer, pages in zip(books.servers, books.held, strict=True) if pages}
    assert now_used == {hop.peer_id for hop in moved}


@pytest.mark.parametrize(
    "chain",
    [
        (),
        (ChainHop("s0", 0, 4),),
        (ChainHop("s0", 0, 4), ChainHop("s1", 3, 12)),
        (ChainHop("s0", 4, 4), ChainHop("s1", 0, 12)),
        (ChainHop("s0", 0, 12), ChainHop("s0", 0, 12)),
    ],
)
def test_a_chain_that_is_none_is_not_booked(chain: tuple[ChainHop, ...]) -> None:
    swarm = small_swarm()
    swarm.tell(ev.SessionResumed(client="c", session_id="x", batch=1, max_length=64, chain=chain, tokens_used=40))
    assert held(swarm) == 0


def test_a_session_that_no_server_sees_is_over_and_so_is_one_that_stands_still() -> None:
    swarm = small_swarm(Settings(page_tokens=8, unseen_s=20.0, idle_s=60.0))
    swarm.ask("c", "unseen")
    for machine in swarm.machines.values():
        machine.used.clear()
    swarm.ask("c", "idle")
    swarm.run(30)
    assert swarm.sessions["unseen"].ended
    assert not swarm.sessions["idle"].ended
    swarm.run(40)
    assert swarm.sessions["idle"].ended
    assert held(swarm) == 0


def test_plans_can_be_made_elsewhere() -> None:
    swarm = VirtualSwarm(settings=Settings(plan_inline=False), check=invariants.check)
    for number in range(3):
        swarm.join(f"s{number}", registration(memory_bytes=30_000_000))
    swarm.run(20)
    asked = [action for _, _, actions in swarm.log for action in actions if isinstance(action, act.MakePlan)]
    assert len(asked) == 1
    assert not any(swarm.serving())
    job = swarm.core.plan_job(asked[0].number)
    assert job is not None
    swarm.tell(ev.PlanMade(plans=make_plan(job)))
    assert swarm.core.plan_job(asked[0].number) is None
    swarm.run(20)
    assert all(swarm.serving())


def test_a_plan_that_was_being_made_is_asked_for_again_after_a_restart() -> None:
    settings = Settings(plan_inline=False)
    swarm = VirtualSwarm(settings=settings)
    for number in range(3):
        swarm.join(f"s{number}", registration(memory_bytes=9_000_000))
    swarm.run(20)
    core = Core(MODEL, settings)
    core.restore(swarm.core.snapshot())
    assert any(isinstance(action, act.MakePlan) for action in core.apply(ev.Tick(), swarm.now + 1))


def test_what_servers_and_clients_make_up_does_no_harm() -> None:
    swarm = small_swarm()
    status = swarm.core.status(swarm.now)
    assert status["covered"]
    report = next(event.report for _, event, _ in swarm.log if isinstance(event, ev.ServerReported))
    liar = registration(held=Span(5, 500), epoch=2**53)
    swarm.core.apply(ev.ServerRegistered(peer="liar", register=liar), swarm.now)
    swarm.tell(ev.ServerReported(peer="nobody", report=report))
    swarm.tell(ev.ServerLost(peer="nobody"))
    swarm.tell(ev.SessionClosed(client="c", session_id="none"))
    swarm.tell(ev.SessionCancelled(client="c", session_id="none"))
    swarm.tell(ev.ServerLeft(peer="liar"))
    swarm.run(10)
    swarm.ask("c", "still")
    assert swarm.sessions["still"].admitted_s is not None
