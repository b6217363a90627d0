"""What holds after every event, whatever happens."""

from geopetals.coordinator.core import events as ev
from tests.coordinator.core.virtual_swarm import VirtualSwarm


def check(swarm: VirtualSwarm) -> None:
    books_are_what_sessions_hold(swarm)
    no_cache_is_given_twice(swarm)
    only_deaths_take_coverage_away(swarm)


def books_are_what_sessions_hold(swarm: VirtualSwarm) -> None:
    desk, page_tokens = swarm.core.desk, swarm.core.settings.page_tokens
    if desk.books is None:
        return
    held = [0] * len(desk.books.servers)
    for session in desk.sessions.values():
        if session.admitted:
            for hop in session.hops():
                held[desk.books.row[hop.peer_id]] += (hop.end - hop.start) * session.pages(page_tokens)
    assert held == desk.books.held
    waiting = [session.session_id for session in desk.waiting]
    assert sorted(waiting) == sorted(each.session_id for each in desk.sessions.values() if not each.admitted)
    numbers = [number for session in desk.sessions.values() for number in session.bookings]
    assert sorted(numbers) == sorted(desk.books.state.reservations)


def only_deaths_take_coverage_away(swarm: VirtualSwarm) -> None:
    """Moves never do, also when a load fails or a server dies in the middle of them."""
    covered = all(swarm.serving())
    if swarm.covered and not covered:
        assert isinstance(swarm.log[-1][1], ev.ServerLost), swarm.log[-1]
    swarm.covered = covered


def no_cache_is_given_twice(swarm: VirtualSwarm) -> None:
    """As the servers see it."""
    for machine in swarm.machines.values():
        if machine.up and machine.state == "ready":
            assert sum(machine.used.values()) <= machine.total, f"{machine.peer} at {swarm.now}"
