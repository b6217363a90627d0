import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.placement.exact import ExactResult, exact_placement
from geopetals.placement.exact.reference import reference_placement
from geopetals.problem import Problem
from geopetals.timing import Objective, cache_slots_used, session_costs
from tests.optima import GOLDEN, golden, least_cost_s
from tests.problems import make_problem, seeds

objectives: st.SearchStrategy[Objective] = st.sampled_from(["relay", "push"])


def check(problem: Problem, found: ExactResult, sessions: list[int], objective: Objective) -> None:
    """The answer is one: spans that fit, chains for all sessions inside them and their caches, and their cost."""
    found.placement.check(problem)
    assert [len(chains) for chains in found.chains_by_client] == sessions
    chains = [chain for mine in found.chains_by_client for chain in mine]
    for hop in [hop for chain in chains for hop in chain]:
        assert found.placement.starts[hop.server] <= hop.start
        assert found.placement.ends[hop.server] == hop.end
    assert all((chain.start, chain.end) == (0, problem.num_blocks) for chain in chains)
    assert (cache_slots_used(chains, problem.num_servers) <= problem.slots(found.placement.held)).all()
    costs = session_costs(problem, objective)
    total_s = sum(costs.chain_s(c, chain) for c, mine in enumerate(found.chains_by_client) for chain in mine)
    assert found.cost_s == pytest.approx(total_s)
    assert found.bound_s <= found.cost_s * (1 + 1e-9)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_optimum_of_the_golden_cases(path: Path) -> None:
    problem, sessions, least_s = golden(path)
    found = exact_placement(problem, np.array(sessions))
    check(problem, found, sessions, "relay")
    assert found.proven
    assert found.cost_s == pytest.approx(least_s, rel=1e-6)
    assert reference_placement(problem, np.array(sessions)).cost_s == pytest.approx(least_s, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    objective=objectives,
    servers=st.integers(1, 3),
    blocks=st.integers(1, 4),
    sessions=st.lists(st.integers(0, 3), min_size=1, max_size=2).filter(any),
    room=st.sampled_from([1.0, 1.6, 3.0]),
    pin=st.booleans(),
)
def test_it_is_the_least_over_all_placements_and_chains(
    seed: int, objective: Objective, servers: int, blocks: int, sessions: list[int], room: float, pin: bool
) -> None:
    problem = make_problem(seed, servers=servers, blocks=blocks, clients=len(sessions), room=room, push=True)
    if pin and problem.memory_bytes[0] >= problem.block_bytes:
        problem = replace(problem, pinned=((blocks - 1, blocks), *[None] * (servers - 1)))
    least_s = least_cost_s(problem, session_costs(problem, objective), sessions)
    if math.isinf(least_s):
        with pytest.raises(MemoryShortage):
            exact_placement(problem, np.array(sessions), objective=objective)
        return
    found = exact_placement(problem, np.array(sessions), objective=objective)
    check(problem, found, sessions, objective)
    assert found.proven
    assert found.cost_s == pytest.approx(least_s, rel=1e-6)
    if objective == "relay":
        assert reference_placement(problem, np.array(sessions)).cost_s == pytest.approx(least_s, rel=1e-6)


def test_sessions_are_whole_numbers_one_for_each_client() -> None:
    problem = make_problem(clients=2)
    for wrong in ([1], [1, -1], [0.5, 1], [0, 0]):
        with pytest.raises(UnsupportedInput, match=r"sessions"):
            exact_placement(problem, np.array(wrong))


def test_when_time_is_over_it_gives_what_was_found_and_its_gap() -> None:
    problem = make_problem(5, servers=7, blocks=24, clients=2, room=4.0)
    found = exact_placement(problem, np.array([3, 3]), time_limit_s=1e-3)
    check(problem, found, [3, 3], "relay")
