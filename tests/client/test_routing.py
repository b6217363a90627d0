import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from geopetals.client.routing import Candidate, Hop, name_blocks, shortest_chain
from geopetals.errors import NoChain
from geopetals.plan import Span


def candidate(
    peer_id: str,
    start: int,
    end: int,
    *,
    rtt_s: float = 1.0,
    block_s: float = 1.0,
    penalty_s: float = 0.0,
    protocol: int = 0,
    links: dict[str, float] | None = None,
) -> Candidate:
    return Candidate(
        peer_id=peer_id,
        start=start,
        end=end,
        rtt_s=rtt_s,
        block_s=block_s,
        penalty_s=penalty_s,
        protocol=protocol,
        links=links or {},
    )


def all_chains(candidates: Sequence[Candidate], end: int, block: int = 0) -> Iterator[list[tuple[Candidate, int]]]:
    """Every way from `block` to `end`, as servers with the blocks they compute: each is left at its end."""
    if block >= end:
        yield []
        return
    for server in candidates:
        if server.start <= block < server.end:
            for rest in all_chains(candidates, end, server.end):
                yield [(server, min(server.end, end) - block), *rest]


def cost_s(chain: Sequence[tuple[Candidate, int]], *, push: bool = True, bad: Sequence[tuple[str, str]] = ()) -> float:
    """By the model: half a round trip to the first and from the last server, whole ones by relay in between."""
    cost = sum(server.penalty_s + server.block_s * blocks for server, blocks in chain)
    cost += (chain[0][0].rtt_s + chain[-1][0].rtt_s) / 2
    for (here, _), (there, _) in pairwise(chain):
        measured = [s.links[o.peer_id] for s, o in ((here, there), (there, here)) if o.peer_id in s.links]
        if push and here.protocol and there.protocol and (here.peer_id, there.peer_id) not in bad:
            cost += (min(measured) if measured else math.hypot(here.rtt_s, there.rtt_s)) / 2
        else:
            cost += (here.rtt_s + there.rtt_s) / 2
    return cost


NAMES = [f"peer{number}" for number in range(7)]
SPANS = st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda span: span[0] != span[1]).map(sorted)
SECONDS = st.floats(0, 10)
LINKS = st.dictionaries(st.sampled_from(NAMES), SECONDS, max_size=3)
ROWS = st.tuples(SPANS, SECONDS, SECONDS, st.one_of(st.just(0.0), SECONDS), st.integers(0, 1), LINKS)
SERVERS = st.lists(ROWS, min_size=1, max_size=7).map(
    lambda rows: [
        candidate(
            NAMES[number], *span, rtt_s=rtt_s, block_s=block_s, penalty_s=penalty_s, protocol=protocol, links=links
        )
        for number, (span, rtt_s, block_s, penalty_s, protocol, links) in enumerate(rows)
    ]
)
PAIRS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=4)


@settings(max_examples=300, deadline=None)
@given(SERVERS, st.booleans(), PAIRS, SPANS)
def test_no_chain_is_cheaper(
    candidates: list[Candidate], push: bool, bad_links: list[tuple[str, str]], ends: list[int]
) -> None:
    span = Span(*ends)
    chains = list(all_chains(candidates, span.end, span.start))
    assume(chains)
    chain = shortest_chain(candidates, 6, span=span, push=push, bad_links=bad_links)
    by_id = {server.peer_id: server for server in candidates}
    assert [hop.start for hop in chain] == [span.start, *(hop.end for hop in chain[:-1])]
    assert chain[-1].end == span.end
    for hop in chain:
        server = by_id[hop.peer_id]
        assert server.start <= hop.start < hop.end == min(server.end, span.end)
        assert hop.protocol == server.protocol
    found = cost_s([(by_id[hop.peer_id], hop.end - hop.start) for hop in chain], push=push, bad=bad_links)
    least = min(cost_s(other, push=push, bad=bad_links) for other in chains)
    assert math.isclose(found, least, rel_tol=1e-9, abs_tol=1e-9)


@given(SERVERS)
def test_missing_blocks_are_named_exactly(candidates: list[Candidate]) -> None:
    missing = [block for block in range(6) if not any(c.start <= block < c.end for c in candidates)]
    assume(missing)
    with pytest.raises(NoChain) as caught:
        shortest_chain(candidates, 6)
    assert f"{name_blocks(missing)} of 6 have no server" in str(caught.value)


@given(SERVERS.flatmap(lambda servers: st.tuples(st.just(servers), st.permutations(servers))))
def test_the_order_of_the_servers_does_not_matter(orders: tuple[list[Candidate], list[Candidate]]) -> None:
    candidates, shuffled = orders
    assume(any(True for _ in all_chains(candidates, 6)))
    assert shortest_chain(shuffled, 6) == shortest_chain(candidates, 6)


def test_without_servers_all_blocks_are_missing() -> None:
    with pytest.raises(NoChain, match="blocks 0:12 of 12 have no server: start one with `geopetals serve`"):
        shortest_chain([], 12)


def test_a_gap_is_named_although_the_rest_is_served() -> None:
    with pytest.raises(NoChain, match=r"blocks 2:4, 7:8 of 8"):
        shortest_chain([candidate("a", 0, 2), candidate("b", 4, 7)], 8)


def test_one_server_in_the_middle_of_its_span() -> None:
    candidates = [candidate("a", 0, 3), candidate("b", 1, 6)]
    assert shortest_chain(candidates, 6) == (Hop(peer_id="a", start=0, end=3), Hop(peer_id="b", start=3, end=6))


def test_a_far_server_of_all_blocks_loses_to_near_ones() -> None:
    near = [candidate("a", 0, 3, rtt_s=0.01), candidate("b", 3, 6, rtt_s=0.01)]
    far = candidate("c", 0, 6, rtt_s=0.2)
    assert [hop.peer_id for hop in shortest_chain([*near, far], 6)] == ["a", "b"]
    assert [hop.peer_id for hop in shortest_chain([near[0], far], 6)] == ["c"]


def test_a_penalty_is_paid_only_where_there_is_no_other_way() -> None:
    good, bad = candidate("good", 0, 2, rtt_s=5.0), candidate("bad", 0, 2, penalty_s=10.0)
    assert [hop.peer_id for hop in shortest_chain([good, bad], 2)] == ["good"]
    assert [hop.peer_id for hop in shortest_chain([bad], 2)] == ["bad"]


def test_servers_that_push_to_each_other_beat_one_that_is_a_little_nearer() -> None:
    ring = [candidate("a", 0, 3, rtt_s=0.1, protocol=1), candidate("b", 3, 6, rtt_s=0.1, protocol=1)]
    stock = candidate("c", 3, 6, rtt_s=0.09)
    assert [hop.peer_id for hop in shortest_chain([*ring, stock], 6)] == ["a", "b"]
    assert [hop.peer_id for hop in shortest_chain([*ring, stock], 6, push=False)] == ["a", "c"]
    assert [hop.peer_id for hop in shortest_chain([*ring, stock], 6, bad_links=[("a", "b")])] == ["a", "c"]


def test_a_link_that_was_measured_counts_more_than_the_estimate() -> None:
    first = candidate("a", 0, 3, rtt_s=0.1, protocol=1, links={"far": 0.3, "near": 0.01})
    others = [candidate(name, 3, 6, rtt_s=rtt_s, protocol=1) for name, rtt_s in (("far", 0.08), ("near", 0.1))]
    assert [hop.peer_id for hop in shortest_chain([first, *others], 6)] == ["a", "near"]


def test_ties_are_broken_the_same_way_everywhere() -> None:
    twins = [candidate("b", 0, 4), candidate("a", 0, 4)]
    assert shortest_chain(twins, 4) == shortest_chain(twins[::-1], 4) == (Hop(peer_id="a", start=0, end=4),)


@pytest.mark.parametrize(
    ("blocks", "text"),
    [([3], "blocks 3:4"), ([3, 4, 9, 10, 11], "blocks 3:5, 9:12"), ([0, 2, 4], "blocks 0:1, 2:3, 4:5")],
)
def test_blocks_are_named_as_half_open_spans(blocks: list[int], text: str) -> None:
    assert name_blocks(blocks) == text
