import math

import numpy as np
import pytest

from geopetals.placement.demand import search_for_demand
from geopetals.placement.load import design_load
from geopetals.problem import Problem


def swarm(rate_per_s: float) -> Problem:
    """One large fast server and small slow ones: the more sessions, the more blocks the slow ones must take."""
    fast = np.arange(6) == 5
    return Problem(
        num_blocks=70,
        block_bytes=1.3234e9,
        kv_bytes=148 * 57344,
        output_tokens=128,
        memory_bytes=np.where(fast, 86e9, 9.1e9),
        max_blocks=np.where(fast, 70, 4),
        decode_block_s=np.where(fast, 3.2e-3, 16e-3),
        prefill_block_s=np.where(fast, 34e-3, 208e-3),
        relay_decode_s=np.full((1, 6), 0.12),
        relay_prefill_s=np.full((1, 6), 0.1),
        demand_per_s=np.array([rate_per_s]),
    )


def in_progress(rate_per_s: float, session_s: float) -> float:
    return rate_per_s * session_s + math.sqrt(rate_per_s * session_s)


@pytest.mark.parametrize("rate_per_s", [0.02, 0.1, 0.15, 0.2])
def test_the_placement_is_for_as_many_sessions_as_are_in_progress_under_it(rate_per_s: float) -> None:
    problem = swarm(rate_per_s)
    found = search_for_demand(problem, steps=300)
    load = sum(found.sessions)
    assert not found.left_over
    assert in_progress(rate_per_s, found.cost_s / load) <= load * 1.05 + 1
    assert load >= design_load(problem)


def test_what_sessions_take_beside_their_chains_counts() -> None:
    alone, longer = (sum(search_for_demand(swarm(0.1), steps=300, initial_s=extra).sessions) for extra in (0.0, 60.0))
    assert longer > alone


def test_where_nothing_carries_the_load_all_sessions_planned_for_find_room() -> None:
    found = search_for_demand(swarm(5.0), steps=300)
    assert not found.left_over
    fewer = search_for_demand(swarm(0.2), steps=300)
    assert sum(found.sessions) >= sum(fewer.sessions)
