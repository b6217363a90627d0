from dataclasses import replace
from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest
from hypothesis import assume, given, settings

from geopetals.bound import decode_bound
from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.placement.cg_bp import blocks_to_hold
from geopetals.plan import Chain, Hop, Placement
from geopetals.problem import Contention, OneWayDelays, Problem, PushDelays
from geopetals.timing import (
    Objective,
    cache_slots_used,
    chunked_prefill_s,
    decode_costs,
    memory_used_bytes,
    prefill_costs,
    session_costs,
    session_s,
    sessions_per_server,
    step_block_s,
)
from tests.problems import make_problem, problems

CHAIN = Chain((Hop(2, 0, 5), Hop(0, 5, 8)))


def test_relay_adds_a_round_trip_and_the_computing_of_each_hop() -> None:
    p = make_problem(clients=2)
    token = p.relay_decode_s[1, [2, 0]].sum() + 5 * p.decode_block_s[2] + 3 * p.decode_block_s[0]
    prompt = p.relay_prefill_s[1, [2, 0]].sum() + 5 * p.prefill_block_s[2] + 3 * p.prefill_block_s[0]
    assert decode_costs(p).chain_s(1, CHAIN) == pytest.approx(token)
    assert prefill_costs(p).chain_s(1, CHAIN) == pytest.approx(prompt)
    whole = prompt + (p.output_tokens - 1) * token
    assert session_costs(p).chain_s(1, CHAIN) == pytest.approx(whole)
    assert session_s(p, 1, CHAIN, wait_s=3.0, initial_s=0.5) == pytest.approx(whole + 3.5)


def test_push_goes_round_the_ring_once() -> None:
    p = make_problem(push=True)
    assert p.push is not None
    d = p.push.decode
    ring = d.from_client_s[0, 2] + d.between_s[2, 0] + d.to_client_s[0, 0]
    compute = 5 * p.decode_block_s[2] + 3 * p.decode_block_s[0]
    assert decode_costs(p, "push").chain_s(0, CHAIN) == pytest.approx(ring + compute)


@given(problem=problems(push=True))
def test_relay_and_push_agree_when_all_delays_are_zero(problem: Problem) -> None:
    shape = (1, problem.num_servers)
    none = OneWayDelays(
        from_client_s=np.zeros(shape), between_s=np.zeros((problem.num_servers,) * 2), to_client_s=np.zeros(shape[::-1])
    )
    still = replace(
        problem,
        relay_decode_s=np.zeros(shape),
        relay_prefill_s=np.zeros(shape),
        push=PushDelays(decode=none, prefill=none),
    )
    half = problem.num_blocks // 2
    chain = Chain((Hop(1, 0, half), Hop(0, half, problem.num_blocks)))
    assert session_costs(still, "push").chain_s(0, chain) == pytest.approx(session_costs(still).chain_s(0, chain))
    try:
        relay, push = decode_bound(still, 0), decode_bound(still, 0, objective="push")
    except MemoryShortage:
        return
    assert push.decode_s == pytest.approx(relay.decode_s)


def test_push_without_delays_between_servers_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="delays between servers are not known"):
        session_costs(make_problem(), "push")


def test_chunks_overlap_links_and_servers_but_never_beat_the_slowest_stage() -> None:
    p = make_problem(push=True)
    times = [chunked_prefill_s(p, 0, CHAIN, chunks=n) for n in (1, 2, 8, 1000)]
    assert times == sorted(times, reverse=True)
    assert p.push is not None
    slowest = max(5 * p.prefill_block_s[2], 3 * p.prefill_block_s[0])
    assert times[-1] >= slowest


def test_in_one_chunk_prefill_takes_what_the_push_model_says() -> None:
    p = make_problem(push=True)
    assert p.push is not None
    late = PushDelays(
        decode=OneWayDelays(**{n: getattr(p.push.decode, n) / 100 for n in DELAYS}), prefill=p.push.prefill
    )
    p = replace(p, push=late)
    assert chunked_prefill_s(p, 0, CHAIN, chunks=1) == pytest.approx(prefill_costs(p, "push").chain_s(0, CHAIN))


DELAYS = ("from_client_s", "between_s", "to_client_s")


def test_a_step_for_several_sessions_reads_the_weights_once() -> None:
    alone = make_problem(servers=2)
    shared = replace(alone, contention=Contention(floor_s=np.array([0.01, 0.02]), session_s=np.array([0.001, 0.002])))
    assert step_block_s(shared, np.array([1, 10])).tolist() == pytest.approx([0.011, 0.04])
    assert step_block_s(alone, 10).tolist() == alone.decode_block_s.tolist()


def test_memory_is_blocks_and_the_caches_of_the_blocks_used() -> None:
    p = make_problem(servers=3)
    placement = Placement.of([(3, 8), None, (0, 5)], 8)
    used = memory_used_bytes(p, placement, [CHAIN, CHAIN])
    assert used.tolist() == [5000 + 6 * p.kv_bytes, 0, 5000 + 10 * p.kv_bytes]
    assert cache_slots_used([CHAIN, CHAIN], 3).tolist() == [6, 0, 10]
    assert sessions_per_server(p, placement)[1] == 0


@settings(max_examples=40, deadline=None)
@given(problem=problems(push=True))
@pytest.mark.parametrize("objective", ["relay", "push"])
def test_the_bound_is_the_cheapest_chain_of_any_placement(objective: Objective, problem: Problem) -> None:
    assume(problem.num_servers <= 5 and problem.num_blocks <= 7)
    most = blocks_to_hold(problem, 1)
    costs = decode_costs(problem, objective)
    chains = [
        costs.chain_s(0, chain)
        for count in range(1, problem.num_servers + 1)
        for servers in permutations(range(problem.num_servers), count)
        for chain in chains_through(servers, most.tolist(), problem.num_blocks)
    ]
    if not chains:
        with pytest.raises(MemoryShortage):
            decode_bound(problem, 0, objective=objective)
        return
    bound = decode_bound(problem, 0, objective=objective)
    assert bound.method == "exact"
    assert bound.decode_s == pytest.approx(min(chains))
    assert sum(blocks for _, blocks in bound.blocks_of) == problem.num_blocks


def chains_through(servers: tuple[int, ...], most: list[int], blocks: int) -> list[Chain]:
    found = []
    for cuts in combinations(range(1, blocks), len(servers) - 1):
        edges = [0, *cuts, blocks]
        hops = [Hop(s, a, b) for s, (a, b) in zip(servers, pairwise(edges), strict=True)]
        if all(hop.blocks <= most[hop.server] for hop in hops):
            found.append(Chain(tuple(hops)))
    return found


def test_the_bound_of_push_is_below_the_best_chain_found_and_says_so() -> None:
    for seed, servers in product(range(3), (12, 40)):
        problem = make_problem(seed, servers=servers, blocks=40, push=True)
        bound = decode_bound(problem, 0, objective="push")
        assert bound.decode_s <= bound.reached_s
        assert (bound.method == "exact") == (bound.decode_s == bound.reached_s)


def test_software_overhead_is_taken_off_the_bound() -> None:
    p = make_problem()
    with_overhead = replace(p, relay_decode_s=p.relay_decode_s + 0.018)
    assert decode_bound(with_overhead, 0, overhead_s=0.018).decode_s == pytest.approx(decode_bound(p, 0).decode_s)
