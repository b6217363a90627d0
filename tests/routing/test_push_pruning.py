import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.errors import NoChain
from geopetals.routing import push_graph
from geopetals.routing.graph import PushGraph, build_graph
from geopetals.timing import session_costs
from tests.problems import make_placement, make_problem, seeds


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    scale=st.sampled_from([0.0, 0.01, 1.0, 100.0]),
    gone=st.sampled_from([0.0, 0.3]),
    few=st.sampled_from([0, 100]),
)
def test_looking_at_few_arcs_finds_the_chain_of_all(seed: int, scale: float, gone: float, few: int) -> None:
    """few 0: always the guided search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(push_graph, "_FEW", few)
        check_chains(seed, scale=scale, gone=gone)


def check_chains(seed: int, *, scale: float, gone: float) -> None:
    problem = make_problem(seed, servers=12, blocks=6, clients=2, push=True)
    costs, placement = session_costs(problem, "push"), make_placement(seed, servers=12, blocks=6)
    pruned = build_graph(placement, costs)
    rng = np.random.default_rng(seed)
    for _ in range(6):
        client = int(rng.integers(2))
        extra_s = rng.exponential(scale, len(pruned.arcs)) if scale else np.zeros(len(pruned.arcs))
        extra_s[rng.random(extra_s.size) < gone] = np.inf
        every = build_graph(placement, costs)
        assert isinstance(every, PushGraph)
        cost_s, chosen, _ = every._among_all(client, every.arc_costs(client) + extra_s)
        if not np.isfinite(cost_s):
            with pytest.raises(NoChain):
                pruned.cheapest(client, extra_s)
            continue
        assert pruned.cheapest(client, extra_s) == (cost_s, every.arcs.chain(chosen))


def test_many_arcs_are_looked_at_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(1, servers=12, blocks=6, push=True)
    pruned = build_graph(make_placement(1, servers=12, blocks=6), session_costs(problem, "push"))
    extra_s = np.ones(len(pruned.arcs))
    found = pruned.cheapest(0, extra_s)
    monkeypatch.setattr(push_graph, "_FEW", 0)
    assert pruned.cheapest(0, extra_s) == found
    monkeypatch.setattr(push_graph, "_NEAR", 0)
    assert pruned.cheapest(0, extra_s) == found


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_least_times_backwards_bound_every_chain(seed: int) -> None:
    problem = make_problem(seed, servers=12, blocks=6, clients=2, push=True)
    costs, placement = session_costs(problem, "push"), make_placement(seed, servers=12, blocks=6)
    graph = build_graph(placement, costs)
    assert isinstance(graph, PushGraph)
    arc_s = graph.arc_costs(1) + np.random.default_rng(seed).exponential(1.0, len(graph.arcs))
    rest_s = graph._least_rest_s(1, arc_s)
    chosen = graph._among_all(1, arc_s)[1]
    left_s = rest_of_chain_s(graph, arc_s, chosen) if chosen else {}
    assert all(rest_s[server] <= here_s * (1 + 1e-9) for server, here_s in left_s.items())


def rest_of_chain_s(graph: PushGraph, arc_s: np.ndarray, chosen: list[int]) -> dict[int, float]:
    """From the end of each server of the chain to client 1."""
    servers = [int(graph.arcs.server[arc]) for arc in chosen]
    here_s = float(graph._delays.to_client_s[servers[-1], 1])
    left_s = {servers[-1]: here_s}
    for before, there, arc in zip(servers[-2::-1], servers[:0:-1], chosen[:0:-1], strict=True):
        here_s += float(graph._delays.between_s[before, there] + arc_s[arc])
        left_s[before] = here_s
    return left_s
