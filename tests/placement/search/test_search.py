"""The search finds placements that are possible, never dearer than CG-BP's, and the same ones from the same seed."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.placement.cg_bp import cg_bp
from geopetals.placement.search import placement_cost, search_placement, sessions_by_client
from geopetals.placement.search.carrying import Batch
from geopetals.placement.search.search import carrier_of, make_instance
from geopetals.plan import Placement
from geopetals.problem import Contention, Problem
from geopetals.routing.shortest import shortest_chain
from geopetals.timing import Objective, session_costs
from tests.problems import all_chains, make_problem, seeds

OBJECTIVES: tuple[Objective, ...] = ("relay", "push")
objectives = st.sampled_from(OBJECTIVES)


def a_problem(seed: int, *, servers: int = 6, room: float = 3.0, contended: bool = False) -> Problem:
    problem = make_problem(seed, servers=servers, blocks=9, clients=2, room=room, push=True)
    if not contended:
        return problem
    share = problem.decode_block_s * np.random.default_rng(seed).uniform(0, 0.6, servers)
    return replace(problem, contention=Contention(floor_s=problem.decode_block_s - share, session_s=share))


@settings(max_examples=25, deadline=None)
@given(seeds, objectives, st.booleans(), st.integers(1, 12), st.sampled_from([1.0, 3.0]))
def test_sessions_that_find_room_fit_and_cost_what_is_said(
    seed: int, objective: Objective, contended: bool, sessions: int, room: float
) -> None:
    problem = a_problem(seed, room=room, contended=contended)
    found = search_placement(problem, sessions, objective=objective, steps=160, seed=seed % 7)
    found.placement.check(problem)
    carrier = carrier_of(make_instance(problem, sessions_by_client(problem, sessions), objective))
    batches = carrier.routed(found.placement.starts.tolist(), found.placement.ends.tolist())
    used = np.zeros(problem.num_servers, dtype=np.int64)
    chains = {tuple((h.server, h.blocks) for h in chain): chain for chain in all_chains(found.placement)}
    costs, total_s = session_costs(problem, objective), 0.0
    for batch in batches:
        assert batch.cost_s == pytest.approx(costs.chain_s(batch.client, chains[batch.hops]))
        total_s += batch.sessions * batch.cost_s
        for server, blocks in batch.hops:
            used[server] += batch.sessions * blocks
    assert (used <= problem.slots(found.placement.held)).all()
    assert sum(batch.sessions for batch in batches) == sessions - found.left_over
    assert found.cost_s == pytest.approx(placement_cost(problem, found.placement, sessions, objective=objective))
    if not found.left_over and not contended:
        assert found.cost_s == pytest.approx(total_s)
    if contended:
        assert found.cost_s >= total_s * (1 - 1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds, objectives, st.booleans(), st.integers(1, 10))
def test_never_dearer_than_cg_bp(seed: int, objective: Objective, contended: bool, sessions: int) -> None:
    problem = a_problem(seed, contended=contended)
    try:
        placement = cg_bp(problem, sessions).placement
    except MemoryShortage:
        return
    found = search_placement(problem, sessions, objective=objective, steps=64)
    least_s = placement_cost(problem, placement, sessions, objective=objective)
    assert found.left_over == 0
    assert found.cg_bp_cost_s is not None
    assert found.cost_s <= min(found.cg_bp_cost_s, least_s) * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(seeds, objectives)
def test_a_session_alone_costs_its_shortest_chain(seed: int, objective: Objective) -> None:
    problem = a_problem(seed)
    found = search_placement(problem, np.array([1, 0]), objective=objective, steps=32)
    if not found.left_over:
        least_s, _ = shortest_chain(found.placement, session_costs(problem, objective), 0)
        assert found.cost_s == pytest.approx(least_s)


@pytest.mark.parametrize("servers", [8, 44])
def test_the_same_seed_and_steps_give_the_same_placement(servers: int) -> None:
    problem = make_problem(3, servers=servers, blocks=24, clients=2, room=servers / 4)
    first, second = (search_placement(problem, 12, steps=400, seed=5) for _ in range(2))
    assert first.placement == second.placement
    assert first == second
    assert first.steps >= 400


@pytest.mark.parametrize("servers", [10, 44])
def test_more_steps_make_it_cheaper(servers: int) -> None:
    problem = make_problem(8, servers=servers, blocks=24, clients=2, room=servers / 3)
    costs = [search_placement(problem, 40, steps=steps).cost_s for steps in (0, 3000)]
    assert costs[1] < costs[0]


def test_a_budget_is_measured_by_the_clock_that_is_passed_in() -> None:
    ticks = iter(range(1_000))
    found = search_placement(make_problem(1), 3, budget_s=20.0, clock=lambda: float(next(ticks)))
    assert 0 < next(ticks) <= 30
    assert found.steps > 0


def test_pins_and_limits_are_respected() -> None:
    free = make_problem(4, servers=7, blocks=10, room=4.0)
    pinned = replace(free, pinned=((2, 4), *[None] * 6), max_blocks=np.array([9, 3, 3, 4, 9, 9, 2]))
    found = search_placement(pinned, 4, steps=800)
    assert found.left_over == 0
    assert (found.placement.starts[0], found.placement.ends[0]) == (2, 4)
    assert (found.placement.held <= pinned.max_blocks).all()


def test_moving_blocks_has_its_price() -> None:
    problem = make_problem(6, servers=8, blocks=12, clients=2, room=4.0)
    running = cg_bp(problem, 4).placement
    free = search_placement(problem, 4, steps=1500, warm=running)
    dear = search_placement(problem, 4, steps=1500, warm=running, move_s_per_block=1e6)
    assert free.cost_s < placement_cost(problem, running, 4)
    assert free.moved_blocks > 0
    assert (dear.placement, dear.moved_blocks) == (running, 0)
    # A price between: what is moved has to pay for itself.
    price_s = 0.3
    some = search_placement(problem, 4, steps=1500, warm=running, move_s_per_block=price_s)
    assert some.cost_s + price_s * some.moved_blocks <= placement_cost(problem, running, 4) * (1 + 1e-9)


def test_servers_without_use_hold_blocks_too() -> None:
    problem = make_problem(2, servers=9, blocks=8, room=12.0)
    found = search_placement(problem, 1, steps=400)
    assert (found.placement.held > 0).all()


def test_what_does_not_fit_is_counted() -> None:
    problem = make_problem(1, servers=3, blocks=8, room=1.5)
    found = search_placement(problem, 4000, steps=64)
    assert 0 < found.left_over < 4000
    assert found.cg_bp_cost_s is None
    assert found.cost_s > placement_cost(problem, found.placement, 4000 - found.left_over)


def test_sessions_are_shared_out_by_demand() -> None:
    problem = replace(make_problem(clients=3), demand_per_s=np.array([3.0, 3.0, 1.0]))
    assert sessions_by_client(problem, 70).tolist() == [30, 30, 10]
    assert sessions_by_client(problem, 2).tolist() == [1, 1, 0]
    assert sessions_by_client(replace(problem, demand_per_s=np.zeros(3)), 4).tolist() == [2, 1, 1]


def test_bad_arguments_are_one_sentence() -> None:
    problem = make_problem()
    with pytest.raises(UnsupportedInput, match="clock"):
        search_placement(problem, 2, budget_s=1.0)
    with pytest.raises(UnsupportedInput, match="at least one"):
        search_placement(problem, 0)
    with pytest.raises(UnsupportedInput, match="at least one"):
        search_placement(problem, np.array([0]))
    with pytest.raises(UnsupportedInput, match="between servers"):
        search_placement(problem, 1, objective="push")


def test_any_placement_has_a_cost() -> None:
    """Also one with servers so full of blocks that no session fits beside them."""
    problem = make_problem(1, servers=3, blocks=6, room=4.0)
    most = int(problem.memory_bytes[0] // problem.block_bytes)
    packed = Placement.of([(0, min(most, 6)), None, None], 6)
    assert placement_cost(problem, packed, 2) > 0


def half_and_half(pinned: tuple[tuple[int, int] | None, ...]) -> Problem:
    """Servers with room for the whole model and a few sessions."""
    problem = make_problem(3, servers=44, blocks=8, room=6.0)
    memory_bytes = np.full(44, 8 * problem.block_bytes + 24 * problem.kv_bytes)
    return replace(problem, memory_bytes=memory_bytes, pinned=pinned)


def test_a_large_swarm_whose_blocks_are_all_pinned_stays_as_it_is() -> None:
    pins = ((0, 2), (2, 8)) * 22
    chained = search_placement(half_and_half(pins), 3, steps=64)
    assert chained.placement == Placement.of(list(pins), 8)
    assert chained.left_over == 0
    assert search_placement(half_and_half(((0, 2),) * 44), 3, steps=64).left_over == 3


def test_a_large_swarm_with_one_server_to_place_is_searched() -> None:
    found = search_placement(half_and_half((*((0, 2), (2, 8)) * 21, (0, 2), None)), 3, steps=400)
    assert found.left_over == 0
    assert found.steps >= 400


def test_stranding_sessions_never_beats_cg_bp_that_carries_all() -> None:
    """Not even where moving costs more than the penalty for them."""
    problem = make_problem(6, servers=8, blocks=12, clients=2, room=4.0)
    useless = Placement.of([(0, 1)] + [None] * 7, 12)
    found = search_placement(problem, 4, steps=64, warm=useless, move_s_per_block=1e9)
    assert found.left_over == 0
    assert found.carried == found.sessions


def test_batches_that_are_alike_are_told_apart() -> None:
    """Parts are taken out batch by batch: of two alike only the one that was chosen."""
    first, second = (Batch(0, 1, 2.0, ((0, 4),)) for _ in range(2))
    left = [first, second]
    left.remove(second)
    assert left[0] is first
