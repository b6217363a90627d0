"""The coordinator was away itself, or lost everybody at once: servers that are well keep their blocks."""

import time

import pytest

from geopetals.coordinator.core import Core, Settings, planner
from geopetals.coordinator.core import actions as act
from geopetals.coordinator.core import events as ev
from geopetals.coordinator.core.actions import action_to_dict
from geopetals.coordinator.core.session import FairOrder, Session
from tests.coordinator.core import invariants
from tests.coordinator.core.virtual_swarm import MODEL, VirtualSwarm, registration


@pytest.fixture(autouse=True)
def _quick_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any plan will do here, and the search takes its time."""
    monkeypatch.setattr(planner, "METHOD", "cg_bp")


def running_swarm(settings: Settings | None = None, *, servers: int = 5) -> VirtualSwarm:
    swarm = VirtualSwarm(settings=settings, check=invariants.check)
    for number in range(servers):
        swarm.join(f"s{number}", registration(memory_bytes=12_000_000))
    swarm.run(60)
    assert all(swarm.serving())
    return swarm


def cut(swarm: VirtualSwarm, peer: str) -> None:
    """Only its channel is gone."""
    swarm.machines[peer].up = False
    swarm.tell(ev.ServerLost(peer=peer))


def back(swarm: VirtualSwarm, peer: str) -> None:
    machine = swarm.machines[peer]
    swarm.join(peer, registration(memory_bytes=12_000_000, held=machine.span, epoch=machine.epoch))


def spans(swarm: VirtualSwarm) -> dict[str, object]:
    return {peer: server.assigned for peer, server in swarm.core.servers.items()}


def test_after_an_outage_of_the_coordinator_nothing_moves_and_sessions_go_on() -> None:
    swarm = running_swarm()
    swarm.noise = 1e6
    swarm.ask("c", "one")
    swarm.run(1)
    for peer in swarm.machines:
        cut(swarm, peer)
    swarm.tell(ev.ClientLost(client="c"))
    before, assigned = spans(swarm), len(swarm.assigned)
    core = Core(MODEL)
    core.restore(swarm.core.snapshot())
    swarm.core, swarm.now = core, swarm.now + 3600.0
    swarm._heap.clear()
    swarm.at(0.0, swarm._beat)
    swarm.tell(ev.Restarted())
    swarm.run(8)
    assert spans(swarm) == before
    swarm.tell(ev.ClientSeen(client="c"))
    for peer in swarm.machines:
        back(swarm, peer)
        swarm.run(1)
    swarm.run(20)
    assert spans(swarm) == before
    assert len(swarm.assigned) == assigned
    assert not swarm.sessions["one"].ended
    assert not swarm.core.desk.sessions["one"].void


def test_after_a_crash_no_plan_is_made_before_servers_were_heard() -> None:
    swarm = running_swarm()
    core = Core(MODEL)
    core.restore(swarm.core.snapshot())
    start_s = swarm.now + 60.0
    core.apply(ev.Restarted(), start_s)
    assert core.apply(ev.ReplanAsked(), start_s + 1) == ()
    found: list[act.Action] = []
    for peer, machine in swarm.machines.items():
        held = registration(memory_bytes=12_000_000, held=machine.span, epoch=machine.epoch)
        assert not any(isinstance(action, act.Explained) for action in found)
        found += core.apply(ev.ServerRegistered(peer=peer, register=held), start_s + 2)
    assert any(isinstance(action, act.Explained) for action in found)


def test_when_nearly_all_servers_are_lost_at_once_they_are_waited_for_and_no_plan_is_made() -> None:
    swarm = running_swarm()
    before, explained = spans(swarm), len(swarm.explained)
    for peer in list(swarm.machines)[:4]:
        cut(swarm, peer)
        swarm.run(0.5)
    swarm.tell(ev.ReplanAsked())
    swarm.run(10)
    assert len(swarm.explained) == explained
    for peer in list(swarm.machines)[:4]:
        back(swarm, peer)
    swarm.run(10)
    assert spans(swarm) == before


def test_when_they_do_not_come_back_the_others_are_planned_with() -> None:
    swarm = running_swarm()
    for peer in list(swarm.machines)[:3]:
        swarm.kill(peer)
    swarm.run(60)
    assert all(swarm.serving())


def test_one_server_that_is_lost_is_gone_after_the_usual_grace() -> None:
    swarm = running_swarm()
    swarm.kill("s0")
    swarm.run(6)
    assert spans(swarm)["s0"] is None


def test_a_server_of_which_nothing_is_heard_is_lost_and_has_to_register_again() -> None:
    swarm = running_swarm()
    swarm.machines["s0"].up = False
    swarm.run(25)
    assert swarm.core.hears("s0")
    swarm.run(11)
    assert not swarm.core.hears("s0")
    assert spans(swarm)["s0"] is None
    back(swarm, "s0")
    swarm.run(10)
    assert swarm.core.hears("s0")


def test_a_replay_of_a_log_with_an_orderly_stop_during_a_plan_gives_the_same() -> None:
    settings = Settings(plan_inline=False)
    swarm = VirtualSwarm(settings=settings)
    for number in range(3):
        swarm.join(f"s{number}", registration(memory_bytes=12_000_000))
    swarm.run(20)
    assert swarm.core.planning.open_job is not None
    swarm.tell(ev.ReplanAsked(reason="also"))
    restarted = Core(MODEL, settings)
    restarted.restore(swarm.core.snapshot())
    later: list[tuple[ev.Event, float]] = [(ev.Restarted(), 100.0), (ev.Tick(), 100.5), (ev.Tick(), 130.0)]
    asked = False
    for event, after_s in later:
        live, again = (core.apply(event, swarm.now + after_s) for core in (swarm.core, restarted))
        assert [action_to_dict(action) for action in live] == [action_to_dict(action) for action in again]
        asked = asked or any(isinstance(action, act.MakePlan) for action in live)
        assert swarm.core.snapshot() == restarted.snapshot()
    assert asked


def test_links_that_change_after_a_plan_do_not_ask_for_the_next_one_at_once() -> None:
    swarm = running_swarm()
    swarm.tell(ev.ReplanAsked(reason="now"))
    planned_s, explained = swarm.now, len(swarm.explained)
    for pair in swarm.rtts:
        swarm.rtts[pair] *= 5
    swarm.run(25)
    assert len(swarm.explained) == explained
    swarm.run_until(lambda: len(swarm.explained) > explained, 60)
    assert swarm.explained[-1].at_s >= planned_s + 30


def test_clients_of_one_join_token_share_its_part_of_the_queue() -> None:
    settings = Settings(page_tokens=8, queue_per_client=5)
    swarm = VirtualSwarm(settings=settings, check=invariants.check)
    for number in range(3):
        swarm.join(f"s{number}", registration(memory_bytes=6_000_000, block_s=0.01))
    swarm.run(15)
    swarm.noise = 1000.0
    opens = [swarm.ask(f"first{number}", f"first{number}", prompt=64, output=64) for number in range(6)]
    assert any(isinstance(action, act.Queued) for action in opens[-1])
    kinds = []
    for number in range(8):
        opened = swarm.sessions["first5"].open
        asked = ev.SessionAsked(client=f"c{number}", open=_renamed(opened, f"n{number}"), group="token")
        kinds += [type(action) for action in swarm.core.apply(asked, swarm.now) if isinstance(action, _ANSWERS)]
    assert kinds == [act.Queued] * 5 + [act.Refused] * 3
    core = Core(MODEL, settings)
    core.restore(swarm.core.snapshot())
    asked = ev.SessionAsked(client="c9", open=_renamed(swarm.sessions["first5"].open, "n9"), group="token")
    assert any(isinstance(action, act.Refused) for action in core.apply(asked, swarm.now))


def test_a_session_that_grew_while_it_waited_gives_back_what_it_was_charged() -> None:
    order = FairOrder()
    first, second, third = (_session(number) for number in range(3))
    order.charge(first, 10.0)
    order.charge(second, 10.0)
    second.max_length *= 100
    order.gave_up(second)
    order.charge(third, 10.0)
    assert third.tag == 10.0


def test_predicted_starts_are_known_on_the_clock_of_the_world() -> None:
    swarm = VirtualSwarm(settings=Settings(page_tokens=8), check=invariants.check)
    swarm._heap.clear()
    swarm.now = time.time()
    swarm.at(0.0, swarm._beat)
    for number in range(3):
        swarm.join(f"s{number}", registration(memory_bytes=6_000_000, block_s=0.01))
    swarm.run(15)
    for number in range(8):
        swarm.ask("c", f"n{number}", prompt=64, output=64)
    queue = list(swarm.core.desk.waiting)
    assert queue
    for session in queue:
        assert session.first_start_s is not None
        assert swarm.now < session.first_start_s < swarm.now + 600
    status = swarm.core.status(swarm.now)
    assert all(each["start_s"] is not None for each in status["queue"])


_ANSWERS = (act.Admitted, act.Queued, act.Refused)


def _renamed(opened: ev.Open, session_id: str) -> ev.Open:
    return ev.Open.from_dict({**opened.to_dict(), "session_id": session_id})


def _session(number: int) -> Session:
    return Session(
        session_id=str(number),
        client="c",
        number=number,
        batch=1,
        max_length=64,
        prompt=32,
        output=32,
        asked_s=0.0,
        tag=0.0,
    )
