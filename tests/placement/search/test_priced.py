"""Priced pods carry all sessions at the cost they say, and the search for large swarms uses them."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.placement.search import search_placement
from geopetals.placement.search.effort import Effort
from geopetals.placement.search.instance import make_instance
from geopetals.placement.search.priced import PodMaker, placed
from geopetals.placement.search.rebuilding import laid_out, priced_pods, rebuilt
from geopetals.placement.search.search import WHOLE_SERVERS, carrier_of
from tests.problems import make_problem, seeds


@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 12), st.sampled_from([4.0, 8.0]))
def test_pods_carry_all_sessions_on_servers_of_their_own(seed: int, first: int, second: int, room: float) -> None:
    problem = make_problem(seed, servers=12, blocks=9, clients=2, room=room, pinned=(None,) * 11 + ((0, 1),))
    instance = make_instance(problem, np.array([first, second]), "relay")
    maker, carrier = PodMaker(instance), carrier_of(instance)
    pods = priced_pods(maker)
    if pods is None:
        return
    effort = Effort(steps=2_000, budget_s=None, clock=None)
    better = rebuilt(maker, pods, rng=random.Random(seed), effort=effort)
    assert sum(pod.cost_s for pod in better) <= sum(pod.cost_s for pod in pods)
    used = [server for pod in better for server, _ in pod.shares]
    assert len(used) == len(set(used))
    assert set(used) <= set(range(11))
    assert np.sum([pod.sessions for pod in better], axis=0).tolist() == [first, second]
    delay_s = np.asarray(instance.costs.relay_s)
    placement = placed(instance, better, random.Random(seed))
    placement.check(problem)
    slots = problem.slots(placement.held)
    for pod in better:
        assert sum(blocks for _, blocks in pod.shares) == 9
        assert all(pod.sessions.sum() * blocks <= slots[server] for server, blocks in pod.shares)
        each_s = sum(delay_s[:, server] + instance.costs.block_s[server] * blocks for server, blocks in pod.shares)
        assert pod.cost_s == pytest.approx(float(pod.sessions @ each_s))
    spans = laid_out(carrier, better, rng=random.Random(seed))
    assert spans.cost_s == pytest.approx(carrier.cost_s(spans.starts, spans.ends))


def test_a_large_swarm_gets_the_same_placement_from_the_same_seed() -> None:
    problem = make_problem(3, servers=WHOLE_SERVERS + 4, blocks=9, clients=2, room=20.0)
    first, again = (search_placement(problem, 24, steps=2_000, seed=5) for _ in range(2))
    assert first.cost_s == again.cost_s
    assert first.placement.starts.tolist() == again.placement.starts.tolist()
    assert first.cg_bp_cost_s is not None
    assert first.cost_s <= first.cg_bp_cost_s
