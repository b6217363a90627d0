from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.errors import BlocksError, NoChain
from geopetals.plan import Chain, Placement, Span
from geopetals.problem import OneWayDelays
from geopetals.routing.graph import build_graph
from geopetals.routing.shortest import backup_chain, shortest_chain
from geopetals.timing import HopCosts, Objective, session_costs
from tests.problems import all_chains, make_placement, make_problem, seeds

objectives: st.SearchStrategy[Objective] = st.sampled_from(["relay", "push"])
sizes = st.tuples(st.integers(1, 6), st.integers(1, 8))


def cheapest(chains: Sequence[Chain], costs: HopCosts) -> float:
    return min(costs.chain_s(0, chain) for chain in chains)


@settings(deadline=None)
@given(seed=seeds, size=sizes, objective=objectives, avoid=st.sets(st.integers(0, 5), max_size=2))
def test_the_chain_is_the_cheapest_of_all(
    seed: int, size: tuple[int, int], objective: Objective, avoid: set[int]
) -> None:
    servers, blocks = size
    placement = make_placement(seed, servers=servers, blocks=blocks)
    costs = session_costs(make_problem(seed, servers=servers, blocks=blocks, push=True), objective)
    avoid = {server for server in avoid if server < servers}
    chains = [chain for chain in all_chains(placement) if not avoid & set(chain.servers)]
    if not chains:
        with pytest.raises(NoChain):
            shortest_chain(placement, costs, 0, avoid=avoid)
        return
    cost_s, chain = shortest_chain(placement, costs, 0, avoid=avoid)
    assert chain in chains
    assert cost_s == pytest.approx(cheapest(chains, costs))
    assert cost_s == pytest.approx(costs.chain_s(0, chain))


@settings(deadline=None)
@given(seed=seeds, objective=objectives)
def test_extra_costs_of_arcs_are_part_of_the_choice(seed: int, objective: Objective) -> None:
    placement = make_placement(seed, servers=5, blocks=5)
    costs = session_costs(make_problem(seed, servers=5, blocks=5, push=True), objective)
    graph = build_graph(placement, costs)
    rng = np.random.default_rng(seed)
    chains = all_chains(placement)
    for _ in range(3 if chains else 0):
        extra_s = rng.choice([0.0, 0.0, 1.0, 5.0], len(graph.arcs)) * rng.uniform(0, 1, len(graph.arcs))

        def total(chain: Chain, extra_s: np.ndarray = extra_s) -> float:
            arcs = [graph.arcs.of_server[hop.server][hop.blocks - 1] for hop in chain]
            return costs.chain_s(0, chain) + float(extra_s[arcs].sum())

        cost_s, chain = graph.cheapest(0, extra_s)
        assert cost_s == pytest.approx(min(total(chain) for chain in chains))
        assert cost_s == pytest.approx(total(chain))


@settings(deadline=None)
@given(seed=seeds, objective=objectives, data=st.data())
def test_a_span_in_the_midst_is_covered_exactly(seed: int, objective: Objective, data: st.DataObject) -> None:
    placement = make_placement(seed, servers=5, blocks=8)
    costs = session_costs(make_problem(seed, servers=5, blocks=8, push=True), objective)
    start = data.draw(st.integers(0, 7))
    span = Span(start, data.draw(st.integers(start + 1, 8)))
    if any(gap.start < span.end and span.start < gap.end for gap in placement.gaps()):
        with pytest.raises(NoChain):
            shortest_chain(placement, costs, 0, span=span)
        return
    _, chain = shortest_chain(placement, costs, 0, span=span)
    assert (chain.start, chain.end) == (span.start, span.end)
    for hop in chain:
        assert placement.starts[hop.server] <= hop.start < hop.end <= placement.ends[hop.server]


def test_missing_blocks_are_named() -> None:
    costs = session_costs(make_problem(servers=2, blocks=6))
    with pytest.raises(NoChain, match="Blocks 2:4, 5:6 of 6"):
        shortest_chain(Placement.of([(0, 2), (4, 5)], 6), costs, 0)
    with pytest.raises(NoChain, match="Blocks 0:3 of 6"):
        shortest_chain(Placement.of([(0, 6), (3, 6)], 6), costs, 0, avoid={0})
    with pytest.raises(BlocksError, match="outside"):
        shortest_chain(Placement.of([(0, 6), (3, 6)], 6), costs, 0, span=Span(4, 7))


@settings(deadline=None)
@given(seed=seeds, objective=objectives)
def test_the_backup_shares_as_few_servers_as_can_be(seed: int, objective: Objective) -> None:
    placement = make_placement(seed, servers=6, blocks=5)
    costs = session_costs(make_problem(seed, servers=6, blocks=5, push=True), objective)
    chains = all_chains(placement)
    if not chains:
        return
    _, primary = shortest_chain(placement, costs, 0)
    backup = backup_chain(placement, costs, 0, primary)

    def shared(chain: Chain) -> int:
        return len(set(chain.servers) & set(primary.servers))

    fewest = min(map(shared, chains))
    if backup is None:
        assert fewest == len(primary)
        return
    assert shared(backup) == fewest
    assert costs.chain_s(0, backup) == pytest.approx(cheapest([c for c in chains if shared(c) == fewest], costs))


@settings(deadline=None)
@given(seed=seeds, objective=objectives)
def test_what_was_asked_before_does_not_decide_between_equal_chains(seed: int, objective: Objective) -> None:
    rng = np.random.default_rng(seed)
    placement = make_placement(seed, servers=6, blocks=5)
    if not placement.covers():
        return
    costs = session_costs(make_problem(seed, servers=6, blocks=5, push=True), objective)
    tied = HopCosts(
        block_s=np.ones(6),
        relay_s=None if costs.relay_s is None else np.ones_like(costs.relay_s),
        push=None
        if costs.push is None
        else OneWayDelays(from_client_s=np.ones((1, 6)), between_s=np.ones((6, 6)), to_client_s=np.ones((6, 1))),
    )
    fresh, used = build_graph(placement, tied), build_graph(placement, tied)
    for _ in range(5):
        used.cheapest(0, rng.choice([0.0, 1.0, 2.0], len(used.arcs)))
    assert used.cheapest(0) == fresh.cheapest(0)
