import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from geopetals.errors import MemoryShortage
from geopetals.placement.bounds import capacity_cost_bound, decomposed, push_cost_bound, relay_cost_bound
from geopetals.placement.bounds.decomposed import hop_costs, pricing_of
from geopetals.placement.bounds.decomposition import lagrangian_s
from geopetals.placement.cg_bp import cg_bp
from geopetals.routing.exact import exact_routing
from geopetals.timing import Objective, session_costs
from tests.optima import GOLDEN, golden, least_cost_s
from tests.problems import make_problem, seeds

objectives: st.SearchStrategy[Objective] = st.sampled_from(["relay", "push"])
BOUNDS = {"relay": relay_cost_bound, "push": push_cost_bound}
ABOVE = 1 + 1e-9


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_no_golden_optimum_is_below_it(path: Path) -> None:
    problem, sessions, least_s = golden(path)
    bound_s = relay_cost_bound(problem, np.array(sessions))
    assert 0.9 * least_s <= bound_s <= least_s * ABOVE


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    objective=objectives,
    servers=st.integers(1, 3),
    blocks=st.integers(1, 4),
    sessions=st.lists(st.integers(0, 3), min_size=1, max_size=2).filter(any),
    room=st.sampled_from([1.0, 1.6, 3.0]),
    rounds=st.sampled_from([1, 4, 100]),
)
def test_no_placement_costs_less(
    seed: int, objective: Objective, servers: int, blocks: int, sessions: list[int], room: float, rounds: int
) -> None:
    """However early the search for prices is stopped."""
    problem = make_problem(seed, servers=servers, blocks=blocks, clients=len(sessions), room=room, push=True)
    least_s = least_cost_s(problem, session_costs(problem, objective), sessions)
    assert BOUNDS[objective](problem, np.array(sessions), rounds=rounds) <= least_s * ABOVE


@settings(deadline=None, max_examples=15)
@given(seed=seeds, objective=objectives, sessions=st.integers(1, 12), prices=seeds)
@example(seed=4294967294, objective="relay", sessions=2, prices=131071)
def test_any_prices_give_a_bound(seed: int, objective: Objective, sessions: int, prices: int) -> None:
    """Of what CG-BP's placement costs under the best routing, for more servers than can be searched through."""
    problem = make_problem(seed, servers=7, blocks=12, clients=2, room=4.0, push=True)
    try:
        placement = cg_bp(problem, 2 * sessions).placement
    except MemoryShortage:
        return
    counts = np.array([sessions, sessions])
    cost_s, _ = exact_routing(problem, placement, counts, objective=objective)
    found = decomposed(problem, counts, objective=objective)
    assert found is not None
    assert 0 < found.bound_s <= cost_s * ABOVE
    costs = session_costs(problem, objective)
    prices_s = np.random.default_rng(prices).exponential(0.01, found.rows.count)
    pricing = pricing_of(costs, problem.num_blocks)
    priced = pricing.price(hop_costs(costs, found.sizes, 2) + found.rows.use_s(prices_s))
    assert lagrangian_s(found.rows, priced, prices_s, math.inf) <= cost_s * ABOVE


def test_what_memory_cannot_carry_costs_infinitely_much() -> None:
    problem = make_problem(servers=3, blocks=9, room=1.5, push=True)
    assert math.isfinite(relay_cost_bound(problem, np.array([1])))
    for sessions in (10_000, 10_000_000):
        assert math.isinf(relay_cost_bound(problem, np.array([sessions])))
        assert math.isinf(push_cost_bound(problem, np.array([sessions])))


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    servers=st.integers(1, 3),
    blocks=st.integers(1, 4),
    sessions=st.lists(st.integers(0, 3), min_size=1, max_size=2).filter(any),
    room=st.sampled_from([1.0, 1.6, 3.0]),
)
def test_no_placement_costs_less_than_memory_allows(
    seed: int, servers: int, blocks: int, sessions: list[int], room: float
) -> None:
    problem = make_problem(seed, servers=servers, blocks=blocks, clients=len(sessions), room=room)
    least_s = least_cost_s(problem, session_costs(problem, "relay"), sessions)
    assert 0 <= capacity_cost_bound(problem, np.array(sessions)) <= least_s * ABOVE


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_memory_alone_proves_less_than_the_decomposition(path: Path) -> None:
    problem, sessions, _ = golden(path)
    counts = np.array(sessions)
    assert 0 < capacity_cost_bound(problem, counts) <= relay_cost_bound(problem, counts) * (1 + 1e-4)
