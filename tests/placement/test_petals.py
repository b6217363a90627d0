from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from geopetals.errors import UnsupportedInput
from geopetals.placement.petals import PetalsServers, blocks_to_hold, cache_slots, petals_placement
from geopetals.problem import Problem
from tests.problems import make_problem, problems

GIB = 2**30


def servers(count: int, *, kv_groups: int = 1) -> PetalsServers:
    return PetalsServers(
        hidden_size=14336, kv_groups=kv_groups, forward_rps=np.full(count, 900.0), network_rps=np.full(count, 500.0)
    )


def test_the_memory_rule_sets_the_cache_and_two_gib_aside() -> None:
    stock = servers(2)
    assert stock.cache_bytes == 2 * 14336 * 2 * 4096
    assert servers(2, kv_groups=8).cache_bytes == 2 * 14336 * 2 * 16384 / 8
    problem = replace(
        make_problem(servers=2, blocks=9),
        block_bytes=1e9,
        memory_bytes=np.array([2 * GIB + 3.5 * (1e9 + stock.cache_bytes), GIB]),
    )
    held = blocks_to_hold(problem, stock)
    assert held.tolist() == [3, 0]
    assert cache_slots(problem, stock, held)[0] == 3 * stock.cache_bytes // problem.kv_bytes


def test_a_server_announces_less_the_more_blocks_it_holds_but_no_more_than_its_link() -> None:
    assert servers(3).announced_rps(np.array([1, 3, 8])).tolist() == [500, 450, 200]


@given(problem=problems())
def test_servers_with_one_block_each_spread_evenly(problem: Problem) -> None:
    order = list(reversed(range(problem.num_servers)))
    one = np.ones(problem.num_servers, dtype=np.int64)
    placement = petals_placement(problem, one, np.full(problem.num_servers, 0.1), order)
    assert placement.held.tolist() == one.tolist()
    assert np.ptp(placement.replicas()) <= 1


def test_pinned_servers_stay_and_count_for_those_that_join() -> None:
    problem = make_problem(servers=3, blocks=4, room=6.0, pinned=(None, (0, 2), None))
    placement = petals_placement(problem, np.array([2, 2, 4]), np.ones(3), [0, 1, 2])
    assert (placement.starts[1], placement.ends[1]) == (0, 2)
    assert (placement.starts[0], placement.ends[0]) == (2, 4)


def test_a_join_order_with_a_server_twice_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="join_order"):
        petals_placement(make_problem(servers=2), np.ones(2, dtype=int), np.ones(2), [0, 0])
