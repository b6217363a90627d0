"""More sessions than there is cache for: they wait in fair order, are told when they start, and start then."""

import random

import pytest

from geopetals.coordinator.core import Settings
from geopetals.coordinator.core import events as ev
from geopetals.coordinator.core.actions import Refused
from tests.coordinator.core import invariants
from tests.coordinator.core.virtual_swarm import VirtualSwarm, registration


def small_swarm(settings: Settings | None = None) -> VirtualSwarm:
    """Cache for about four sessions of 128 tokens."""
    swarm = VirtualSwarm(settings=settings or Settings(page_tokens=8), check=invariants.check)
    for number in range(3):
        swarm.join(f"s{number}", registration(memory_bytes=6_000_000, block_s=0.01))
    swarm.run(15)
    assert all(swarm.serving())
    return swarm


def waits(swarm: VirtualSwarm) -> dict[str, float]:
    return {name: (each.admitted_s or 1e9) - each.asked_s for name, each in swarm.sessions.items()}


def all_over(swarm: VirtualSwarm) -> bool:
    return all(each.closed_s is not None or each.refused is not None for each in swarm.sessions.values())


@pytest.mark.parametrize("noise", [0.7, 1.0, 1.3])
def test_fifty_sessions_at_three_times_capacity_start_when_they_were_told(noise: float) -> None:
    swarm, rng = small_swarm(), random.Random(1)
    swarm.noise = noise
    for number in range(8):
        swarm.ask(f"early{number % 2}", f"early{number}", output=60)
        swarm.run(30)
    for number in range(50):
        swarm.ask(f"c{number % 5}", f"n{number}", prompt=rng.randint(8, 64), output=rng.randint(16, 128))
        swarm.run(0.02)
    swarm.run(0.6)
    all_asked_s = swarm.now
    swarm.run_until(lambda: all_over(swarm), 3000)
    late = [each for each in swarm.sessions.values() if (each.admitted_s or 0) > all_asked_s]
    assert len(late) > 30
    for each in late:
        assert each.admitted_s is not None
        told_s = [start_s for at_s, start_s in each.predictions if at_s <= all_asked_s][-1]
        wait_s = each.admitted_s - all_asked_s
        assert abs(each.admitted_s - told_s) <= max(0.5, 0.2 * wait_s), (each.open.session_id, wait_s)


def test_a_client_with_many_sessions_does_not_keep_another_waiting() -> None:
    swarm = small_swarm()
    for number in range(30):
        swarm.ask("many", f"many{number}", output=96)
    swarm.run(1)
    for number in range(3):
        swarm.ask("few", f"few{number}", output=96)
    swarm.run_until(lambda: all_over(swarm), 3000)
    wait = waits(swarm)
    ahead = sum(wait[f"many{number}"] < wait["few2"] for number in range(30))
    assert ahead <= 4 + 2 * 3 + 2


def test_who_waits_starts_in_the_instant_in_which_cache_comes_free() -> None:
    swarm = small_swarm()
    for number in range(4):
        swarm.ask("a", f"running{number}", prompt=64, output=64)
    swarm.ask("b", "waiting", prompt=64, output=64)
    assert swarm.sessions["waiting"].admitted_s is None
    swarm.run(1)
    swarm.close("running2", tokens=5)
    assert swarm.sessions["waiting"].admitted_s == swarm.now


def test_beyond_the_bound_sessions_are_refused_with_a_time_that_is_good_for_another_try() -> None:
    swarm = small_swarm(Settings(page_tokens=8, queue_length=10, queue_per_client=10))
    for number in range(20):
        swarm.ask(f"c{number}", f"n{number}", output=96)
    refused = [each for each in swarm.sessions.values() if each.refused is not None]
    admitted = sum(each.admitted_s is not None for each in swarm.sessions.values())
    assert len(refused) == 20 - 10 - admitted
    retry_s = max(each.refused.retry_after_s for each in refused if each.refused)
    assert 0 < retry_s < 600
    swarm.run(retry_s)
    swarm.ask("again", "again", output=96)
    assert swarm.sessions["again"].refused is None


def test_a_session_that_fits_nowhere_is_refused_at_once() -> None:
    swarm = small_swarm()
    swarm.ask("c", "huge", output=100_000)
    refused = swarm.sessions["huge"].refused
    assert refused is not None
    assert "shorten the session" in refused.why


def test_leases_of_a_client_that_is_gone_end_and_its_cache_is_given_on() -> None:
    swarm = small_swarm()
    swarm.noise = 1000.0
    for number in range(4):
        swarm.ask("crashed", f"n{number}", prompt=64, output=64)
    swarm.ask("other", "waiting", prompt=64, output=64)
    swarm.tell(ev.ClientLost(client="crashed"))
    swarm.run(9)
    assert swarm.sessions["waiting"].admitted_s is None
    swarm.run(2)
    assert swarm.sessions["waiting"].admitted_s is not None
    assert swarm.sessions["n0"].ended


def test_a_client_that_is_back_in_time_keeps_its_sessions() -> None:
    swarm = small_swarm()
    swarm.noise = 1000.0
    swarm.ask("c", "one")
    swarm.tell(ev.ClientLost(client="c"))
    swarm.run(5)
    swarm.tell(ev.ClientSeen(client="c"))
    swarm.run(30)
    assert not swarm.sessions["one"].ended


def test_asking_again_gives_the_same_answer() -> None:
    swarm = small_swarm()
    swarm.tell(ev.ClientSeen(client="c"))
    first = swarm.ask("c", "one")
    swarm.run(0.1)
    again = swarm.tell(ev.SessionAsked(client="c", open=swarm.sessions["one"].open))
    assert again == first
    stranger = swarm.tell(ev.SessionAsked(client="thief", open=swarm.sessions["one"].open))
    assert any(isinstance(action, Refused) for action in stranger)


def test_cache_that_others_hold_on_a_server_is_not_given_away() -> None:
    swarm = small_swarm()
    for machine in swarm.machines.values():
        machine.used["recovery"] = machine.total - 100
    swarm.run(1)
    swarm.ask("c", "one", prompt=64, output=64)
    assert swarm.sessions["one"].admitted_s is None
    for machine in swarm.machines.values():
        machine.used.pop("recovery")
    swarm.run(1)
    assert swarm.sessions["one"].admitted_s is not None
