from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.errors import MemoryShortage
from geopetals.placement.cg_bp import CgBp, cg_bp
from geopetals.placement.load import cg_bp_for_demand, design_load, largest_load, lone_session_s
from geopetals.problem import Problem
from geopetals.routing.shortest import shortest_chain
from geopetals.timing import decode_costs, memory_used_bytes, session_costs
from tests.problems import make_problem, problems

loads = st.integers(1, 12)


def place(problem: Problem, sessions: int) -> CgBp | None:
    try:
        return cg_bp(problem, sessions)
    except MemoryShortage:
        return None


@settings(deadline=None)
@given(problem=problems(clients=2), sessions=loads)
def test_all_blocks_carry_all_sessions_or_it_says_which_do_not(problem: Problem, sessions: int) -> None:
    plan = place(problem, sessions)
    if plan is None:
        with pytest.raises(MemoryShortage, match=r"Blocks \d+:\d+"):
            cg_bp(problem, sessions)
        return
    plan.placement.check(problem)
    held = plan.placement.held
    carried = np.zeros(problem.num_blocks, dtype=np.int64)
    for server, count in enumerate(problem.slots(held) // np.maximum(held, 1)):
        carried[plan.placement.starts[server] : plan.placement.ends[server]] += count
    assert plan.placement.covers()
    assert carried.min() >= sessions


@settings(deadline=None)
@given(problem=problems(clients=2), sessions=loads, data=st.data())
def test_shortest_paths_never_exceed_memory_and_keep_the_guarantee(
    problem: Problem, sessions: int, data: st.DataObject
) -> None:
    plan = place(problem, sessions)
    if plan is None:
        return
    costs = decode_costs(problem)
    clients = data.draw(st.lists(st.integers(0, 1), min_size=sessions, max_size=sessions))
    routes = [shortest_chain(plan.placement, costs, client) for client in clients]
    used = memory_used_bytes(problem, plan.placement, [chain for _, chain in routes])
    assert (used <= problem.memory_bytes).all()
    assert plan.bound_s is not None
    assert all(cost_s <= plan.bound_s * (1 + 1e-9) for cost_s, _ in routes)


@settings(deadline=None)
@given(problem=problems(), sessions=loads, data=st.data())
def test_pinned_servers_stay_and_limits_hold(problem: Problem, sessions: int, data: st.DataObject) -> None:
    pinned: list[tuple[int, int] | None] = [None] * problem.num_servers
    server = data.draw(st.integers(0, problem.num_servers - 1))
    most = min(int(problem.memory_bytes[server] // problem.block_bytes), problem.num_blocks)
    if most:
        start = data.draw(st.integers(0, problem.num_blocks - most))
        pinned[server] = (start, start + most)
    limits = np.full(problem.num_servers, max(1, problem.num_blocks // 2))
    limits[server] = problem.num_blocks
    limited = replace(problem, pinned=tuple(pinned), max_blocks=limits)
    plan = place(limited, sessions)
    if plan is not None:
        plan.placement.check(limited)
        assert plan.bound_s is None or not most


def test_a_server_that_no_client_reaches_is_not_used() -> None:
    problem = make_problem(servers=4, room=6.0)
    delays = problem.relay_decode_s.copy()
    delays[0, 2] = np.inf
    assert cg_bp(replace(problem, relay_decode_s=delays), 1).placement.span(2) is None


@settings(deadline=None)
@given(problem=problems(clients=2))
def test_the_design_load_is_the_mean_and_a_deviation_in_progress(problem: Problem) -> None:
    try:
        session_s = lone_session_s(problem, initial_s=0.5)
    except MemoryShortage:
        with pytest.raises(MemoryShortage):
            design_load(problem)
        return
    mean = problem.demand_per_s.sum() * session_s
    wanted = int(np.floor(mean + np.sqrt(mean) + 0.5))
    assert design_load(problem, initial_s=0.5) == max(1, min(wanted, largest_load(problem)))


@settings(deadline=None)
@given(problem=problems(clients=2))
def test_a_placement_for_demand_exists_whenever_one_session_can_be_served(problem: Problem) -> None:
    if place(problem, 1) is None:
        with pytest.raises(MemoryShortage):
            cg_bp_for_demand(problem)
        return
    plan = cg_bp_for_demand(problem)
    assert plan.placement.covers()
    assert 1 <= plan.sessions <= design_load(problem)
    if plan.sessions < design_load(problem):
        assert place(problem, plan.sessions + 1) is None


def test_clients_without_demand_do_not_enter_the_mean() -> None:
    problem = replace(make_problem(clients=2, room=4.0), demand_per_s=np.array([0.0, 2.0]))
    cost_s, _ = shortest_chain(cg_bp(problem, 1).placement, session_costs(problem), 1)
    assert lone_session_s(problem) == pytest.approx(cost_s)
