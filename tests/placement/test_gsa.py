from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals.errors import GeoPetalsError, MemoryShortage, NoChain
from geopetals.placement.gsa import gsa, gsa_chains
from geopetals.problem import Problem
from geopetals.timing import memory_used_bytes
from tests.problems import make_problem, problems


@given(problem=problems(), sessions=st.integers(1, 8), blocks=st.integers(1, 5))
def test_sessions_admitted_never_exceed_memory(problem: Problem, sessions: int, blocks: int) -> None:
    try:
        plan = gsa(problem, sessions, blocks=min(blocks, problem.num_blocks))
        chains = gsa_chains(plan, sessions)
    except GeoPetalsError:
        return
    assert plan.placement.covers()
    assert (memory_used_bytes(problem, plan.placement, chains) <= problem.memory_bytes).all()


def test_each_stage_gives_its_fastest_server_with_room() -> None:
    problem = make_problem(servers=6, blocks=4, room=12.0)
    plan = gsa(problem, 2, blocks=2)
    for chain in gsa_chains(plan, 2):
        for hop in chain:
            rivals = np.flatnonzero(plan.stages == plan.stages[hop.server])
            assert plan.hop_s[hop.server] == plan.hop_s[rivals].min()


def test_a_full_stage_and_too_few_servers_are_told() -> None:
    problem = make_problem(servers=2, blocks=4, room=3.0)
    with pytest.raises(MemoryShortage, match="for 4 stages"):
        gsa(problem, 1, blocks=1)
    small = replace(problem, memory_bytes=np.full(2, 2 * 1000 + 2 * problem.kv_bytes))
    with pytest.raises(NoChain, match="is full after 1 of 2 sessions"):
        gsa_chains(gsa(small, 2, blocks=2), 2)
