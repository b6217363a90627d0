import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.errors import MemoryShortage, NoChain, ServerFull
from geopetals.plan import Placement
from geopetals.routing.exact import exact_routing
from geopetals.timing import Objective, cache_slots_used, session_costs
from tests.optima import least_routing_s
from tests.problems import make_placement, make_problem, seeds

objectives: st.SearchStrategy[Objective] = st.sampled_from(["relay", "push"])


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    objective=objectives,
    servers=st.integers(1, 5),
    blocks=st.integers(1, 5),
    sessions=st.lists(st.integers(0, 3), min_size=1, max_size=2).filter(any),
)
def test_it_is_the_least_over_all_ways_to_share_the_caches(
    seed: int, objective: Objective, servers: int, blocks: int, sessions: list[int]
) -> None:
    problem = make_problem(seed, servers=servers, blocks=blocks, clients=len(sessions), room=2.5, push=True)
    placement = make_placement(seed, servers=servers, blocks=blocks)
    try:
        placement.check(problem)
    except MemoryShortage:
        return
    costs = session_costs(problem, objective)
    least_s = least_routing_s(problem, placement, costs, sessions)
    if math.isinf(least_s):
        with pytest.raises((NoChain, ServerFull)):
            exact_routing(problem, placement, np.array(sessions), objective=objective)
        return
    cost_s, chains = exact_routing(problem, placement, np.array(sessions), objective=objective)
    assert cost_s == pytest.approx(least_s, rel=1e-6)
    assert [len(mine) for mine in chains] == sessions
    assert cost_s == pytest.approx(sum(costs.chain_s(c, chain) for c, mine in enumerate(chains) for chain in mine))
    used = cache_slots_used([chain for mine in chains for chain in mine], servers)
    assert (used <= problem.slots(placement.held)).all()


def test_it_says_why_it_cannot() -> None:
    problem = make_problem(servers=2, blocks=4, room=2.0)
    with pytest.raises(NoChain, match="Blocks 2:4 of 4"):
        exact_routing(problem, Placement.of([(0, 2), None], 4), np.array([1]))
    with pytest.raises(ServerFull, match="1000 sessions"):
        exact_routing(problem, Placement.of([(0, 2), (2, 4)], 4), np.array([1000]))
