from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.errors import MemoryShortage, NoChain, ServerFull, UnsupportedInput
from geopetals.placement.cg_bp import cg_bp
from geopetals.plan import Chain, Placement, Reservation, Span
from geopetals.problem import Contention, Problem
from geopetals.routing.backoff import paper_accounting
from geopetals.routing.state import RESERVATION, Accounting, RouterState
from geopetals.timing import Objective
from tests.problems import all_chains, make_problem, seeds

modes = st.sampled_from([RESERVATION, paper_accounting(0.25)])
objectives: st.SearchStrategy[Objective] = st.sampled_from(["relay", "push"])
gaps = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=12)


def make_state(seed: int, accounting: Accounting = RESERVATION, objective: Objective = "relay") -> RouterState:
    """Few servers and little cache, so that sessions have to wait."""
    problem = make_problem(seed, servers=5, blocks=5, room=6.0, push=True)
    held = cg_bp(problem, 1).placement
    tight = held.weight_bytes(problem) + problem.kv_bytes * held.held * np.random.default_rng(seed).integers(1, 3, 5)
    return RouterState(replace(problem, memory_bytes=tight), held, accounting=accounting, objective=objective)


def taken(reservations: Sequence[Reservation], server: int, instant: float) -> int:
    return sum(
        hop.blocks
        for r in reservations
        for hop in r.route.chain
        if hop.server == server and r.held_from_s <= instant < r.end_s
    )


def earliest_start(state: RouterState, chain: Chain, now: float) -> float:
    """By trying: from when on every server of the chain has its slots free at every later instant."""
    held = tuple(state.reservations.values())
    instants = sorted({now, *(r.end_s for r in held if r.end_s > now), *(r.held_from_s for r in held)})
    fits = [
        all(taken(held, hop.server, t) + hop.blocks <= state.ledgers[hop.server].slots for hop in chain)
        for t in instants
    ]
    return next(t for place, t in enumerate(instants) if t >= now and all(fits[place:]))


def fill(state: RouterState, gaps: Sequence[float]) -> tuple[list[Reservation], float]:
    now, opened = 0.0, []
    for gap in gaps:
        now += gap
        opened.append(state.open(state.route(0, now), now))
    return opened, now


@settings(deadline=None)
@given(seed=seeds, gaps=gaps, objective=objectives)
def test_a_session_waits_for_the_earliest_feasible_start(seed: int, gaps: list[float], objective: Objective) -> None:
    state = make_state(seed, objective=objective)
    _, now = fill(state, gaps)
    for chain in all_chains(state.placement):
        assert state.route_along(chain, 0, now).start_s == earliest_start(state, chain, now)


@settings(deadline=None)
@given(seed=seeds, gaps=gaps, objective=objectives)
def test_the_chain_has_the_least_sum_of_costs_and_waits(seed: int, gaps: list[float], objective: Objective) -> None:
    state = make_state(seed, objective=objective)
    _, now = fill(state, gaps)

    def weight(chain: Chain) -> float:
        waits = [max(state.free_from_s(hop.server, hop.blocks, now) - now, 0.0) for hop in chain]
        return state.costs.chain_s(0, chain) + sum(waits)

    route = state.route(0, now)
    assert route.cost_s == pytest.approx(weight(route.chain))
    assert route.cost_s == pytest.approx(min(map(weight, all_chains(state.placement))))


@settings(deadline=None)
@given(seed=seeds, gaps=gaps)
def test_a_session_with_a_larger_cache_holds_more_slots(seed: int, gaps: list[float]) -> None:
    problem = make_problem(seed, servers=5, blocks=5, room=6.0)
    placement = cg_bp(problem, 1).placement
    slots = placement.held * np.random.default_rng(seed).integers(3, 5, 5)
    wide = RouterState(problem, placement, slots=slots)
    before = snapshot(wide, 0.0)
    now = 0.0
    for gap in gaps:
        now += gap
        route = wide.route(0, now, slots_per_block=2)
        wide.open(route, now)
    for ledger in wide.ledgers:
        assert ledger.peak(now, float("inf")) <= ledger.slots
        assert ledger.booked % 2 == 0
    for reservation in list(wide.reservations.values()):
        wide.close(reservation, now)
    assert [row[1:3] for row in snapshot(wide, 0.0)[1]] == [row[1:3] for row in before[1]]  # type: ignore[index]


def test_a_wide_session_waits_where_a_narrow_one_fits() -> None:
    problem = make_problem(servers=1, blocks=2, room=3.0)
    state = RouterState(problem, Placement.of([(0, 2)], 2), slots=np.array([6]))
    first = state.open(state.route(0, 0.0, slots_per_block=2), 0.0)
    assert state.route(0, 0.0).start_s == 0.0
    assert state.route(0, 0.0, slots_per_block=2).start_s == first.end_s
    with pytest.raises(ServerFull):
        state.route(0, 0.0, slots_per_block=4)


@settings(deadline=None)
@given(seed=seeds, gaps=gaps, accounting=modes)
def test_sessions_in_progress_never_exceed_memory(seed: int, gaps: list[float], accounting: Accounting) -> None:
    state = make_state(seed, accounting)
    opened, _ = fill(state, gaps)
    for start in [r.route.start_s for r in opened]:
        running = [r.route.chain for r in opened if r.route.start_s <= start < r.end_s]
        for server, ledger in enumerate(state.ledgers):
            assert sum(hop.blocks for chain in running for hop in chain if hop.server == server) <= ledger.slots


@settings(deadline=None)
@given(seed=seeds, gaps=gaps, accounting=modes, data=st.data())
def test_opening_and_closing_leaves_the_state_as_it_was(
    seed: int, gaps: list[float], accounting: Accounting, data: st.DataObject
) -> None:
    state = make_state(seed, accounting)
    opened, now = fill(state, gaps)
    before = snapshot(state, now)
    extra = [state.open(state.route(0, now), now) for _ in range(3)]
    for reservation in data.draw(st.permutations(extra)):
        state.close(reservation, now)
    assert snapshot(state, now) == before
    for reservation in data.draw(st.permutations(opened)):
        state.close(reservation, now)
    assert snapshot(state, now) == snapshot(make_state(seed, accounting), now)


def snapshot(state: RouterState, now: float) -> tuple[object, ...]:
    """Of what is to come: that a promise has begun is noticed at the next decision only."""
    ledgers = [(m.slots, m.booked, list(m.ends), [s for s in m.starts if s[0] > now]) for m in state.ledgers]
    return state.arc_waits_s(now).tolist(), ledgers, dict(state.reservations)


@settings(deadline=None)
@given(seed=seeds, gaps=gaps, data=st.data())
def test_a_waiting_session_starts_earlier_when_others_end_early(
    seed: int, gaps: list[float], data: st.DataObject
) -> None:
    state = make_state(seed)
    opened, now = fill(state, gaps)
    for reservation in data.draw(st.lists(st.sampled_from(opened), unique_by=lambda r: r.number)):
        state.close(reservation, now)
    for reservation in list(state.reservations.values()):
        moved = state.advance(reservation, now)
        assert now <= moved.held_from_s <= reservation.held_from_s or moved == reservation
        assert moved.end_s - moved.held_from_s == pytest.approx(reservation.end_s - reservation.held_from_s)
    held = tuple(state.reservations.values())
    for instant in [now, *(r.held_from_s for r in held if r.held_from_s > now)]:
        for server, ledger in enumerate(state.ledgers):
            assert taken(held, server, instant) <= ledger.slots


def test_a_route_that_others_overtook_is_refused() -> None:
    state = one_server()
    first, second = state.route(0, 0.0), state.route(0, 0.0)
    state.open(first, 0.0)
    with pytest.raises(ServerFull, match="route again"):
        state.open(second, 0.0)


def one_server(**changes: object) -> RouterState:
    problem = make_problem(servers=1, blocks=2, room=3.0)
    fields = {"memory_bytes": np.array([2000 + 2 * problem.kv_bytes])} | changes
    return RouterState(replace(problem, **fields), Placement.of([(0, 2)], 2))  # type: ignore[arg-type]


def test_a_full_server_makes_sessions_queue_in_order() -> None:
    state = one_server()
    routes = []
    for _ in range(3):
        routes.append(state.route(0, 0.0))
        state.open(routes[-1], 0.0)
    assert [route.start_s for route in routes] == [0.0, routes[0].end_s, routes[1].end_s]
    assert routes[2].wait_s == routes[1].end_s


def test_advancing_after_an_early_end_wakes_the_next_in_line() -> None:
    state = one_server()
    first, second, third = (state.open(state.route(0, 0.0), 0.0) for _ in range(3))
    state.close(first, 1.0)
    second = state.advance(second, 1.0)
    third = state.advance(third, 1.0)
    assert second.held_from_s == 1.0
    assert third.held_from_s == second.end_s


def test_an_extended_session_holds_its_cache_for_longer() -> None:
    state = one_server()
    first = state.open(state.route(0, 0.0), 0.0)
    assert state.overdue(first.end_s) == (first,)
    first = state.extend(first, first.end_s + 5, first.end_s)
    assert state.route(0, 1.0).start_s == first.end_s
    assert not state.overdue(first.end_s - 1)


def test_a_reservation_is_closed_once() -> None:
    state = one_server()
    reservation = state.open(state.route(0, 0.0), 0.0)
    with pytest.raises(ValueError, match="open already"):
        state.restore(reservation, 0.0)
    state.close(reservation, 0.0)
    with pytest.raises(ValueError, match="not open"):
        state.close(reservation, 0.0)


@settings(deadline=None)
@given(seed=seeds, gaps=gaps)
def test_a_restored_state_decides_as_the_one_before(seed: int, gaps: list[float]) -> None:
    state = make_state(seed)
    opened, now = fill(state, gaps)
    other = RouterState(state.problem, state.placement)
    for reservation in opened:
        other.restore(reservation, now)
    assert other.route(0, now) == state.route(0, now)
    assert other.open(other.route(0, now), now).number == len(opened)


def two_ways() -> RouterState:
    problem = make_problem(servers=3, blocks=4, room=6.0)
    return RouterState(problem, Placement.of([(0, 4), (0, 2), (2, 4)], 4))


def test_a_server_that_is_gone_is_not_taken_until_it_is_back() -> None:
    state = two_ways()
    best = state.route(0, 0.0).chain.servers
    reservation = state.open(state.route(0, 0.0), 0.0)
    assert state.fail(best[0], 0.0) == (reservation,)
    other = state.route(0, 0.0).chain.servers
    assert best[0] not in other
    state.fail(other[0], 0.0)
    with pytest.raises(NoChain, match="Blocks 0:"):
        state.route(0, 0.0)
    span = state.placement.span(best[0])
    state.resize(best[0], 0.0, slots=state.ledgers[best[0]].slots, span=span)
    assert state.route(0, 0.0).chain.servers == best


def test_avoided_servers_are_not_taken() -> None:
    state = two_ways()
    assert state.route(0, 0.0, avoid=[0]).chain.servers == (1, 2)
    assert state.route(0, 0.0, avoid=[2]).chain.servers == (0,)
    with pytest.raises(NoChain, match="Blocks 2:4"):
        state.route(0, 0.0, avoid=[0, 2])


def test_a_server_that_changes_its_blocks_is_entered_at_the_new_ones() -> None:
    state = two_ways()
    reservation = state.open(state.route(0, 0.0, avoid=[0]), 0.0)
    state.resize(1, 0.0, slots=20, span=Span(1, 3))
    assert state.route(0, 0.0).chain.servers[0] == 0
    state.resize(1, 0.0, slots=20, span=Span(0, 2))
    state.close(reservation, 0.0)
    assert state.ledgers[1].booked == 0
    assert state.route(0, 0.0, avoid=[0]).chain.servers == (1, 2)


def test_a_server_without_cache_for_one_session_is_full_not_gone() -> None:
    with pytest.raises(ServerFull, match="No chain has cache"):
        one_server(memory_bytes=np.array([2000.0])).route(0, 0.0)


def test_a_placement_beyond_memory_is_refused() -> None:
    with pytest.raises(MemoryShortage):
        one_server(memory_bytes=np.array([1500.0]))


def busy_pair() -> Problem:
    """Two servers alike but for a slightly longer way to the second, which slow down with their sessions."""
    problem = make_problem(servers=2, blocks=4, room=20.0)
    return replace(
        problem,
        decode_block_s=np.full(2, 0.02),
        prefill_block_s=np.full(2, 0.1),
        relay_decode_s=np.array([[0.05, 0.051]]),
        relay_prefill_s=np.array([[0.05, 0.051]]),
        contention=Contention(floor_s=np.full(2, 0.01), session_s=np.full(2, 0.01)),
    )


def test_with_compute_queueing_sessions_spread_over_equal_servers() -> None:
    both = Placement.of([(0, 4), (0, 4)], 4)
    plain, aware = RouterState(busy_pair(), both), RouterState(busy_pair(), both, compute_queueing=True)
    for state, expected in ((plain, {0}), (aware, {0, 1})):
        chosen = set()
        for _ in range(6):
            route = state.route(0, 0.0)
            state.open(route, 0.0)
            chosen |= set(route.chain.servers)
        assert chosen == expected
    crowded, alone = aware.route(0, 0.0), plain.route(0, 0.0)
    assert crowded.end_s - crowded.start_s > alone.end_s - alone.start_s
    for reservation in list(aware.reservations.values()):
        aware.close(reservation, 0.0)
    assert aware.route(0, 0.0) == alone


def test_compute_queueing_needs_the_times_for_several_sessions() -> None:
    problem = make_problem(servers=1, blocks=2, room=3.0)
    with pytest.raises(UnsupportedInput, match="Queueing for compute"):
        RouterState(problem, Placement.of([(0, 2)], 2), compute_queueing=True)


def test_a_retry_just_before_the_cache_is_free_starts_when_it_is() -> None:
    """Retries are rounded down by a billionth: the promise is for the instant at which there is room."""
    lone = one_server()
    state = RouterState(lone.problem, lone.placement, accounting=paper_accounting())
    free_s = 1 + 5e-10
    state.open(replace(state.route(0, 0.0), end_s=free_s), 0.0)
    route = state.route(0, 0.0)
    assert (route.wait_s, route.start_s) == (1.0, free_s)
    state.open(route, 0.0)
