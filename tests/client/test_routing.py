import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from geopetals.client.routing import Candidate, Hop, name_blocks, shortest_chain
from geopetals.errors import NoChain


def candidate(
    peer_id: str, start: int, end: int, *, rtt_s: float = 1.0, block_s: float = 1.0, penalty_s: float = 0.0
) -> Candidate:
    return Candidate(peer_id=peer_id, start=start, end=end, rtt_s=rtt_s, block_s=block_s, penalty_s=penalty_s)


def all_chains(candidates: Sequence[Candidate], num_blocks: int, block: int = 0) -> Iterator[list[Candidate]]:
    """Every way to go on from `block`: a server is entered at any of its blocks and left at its end."""
    if block == num_blocks:
        yield []
        return
    for server in candidates:
        if server.start <= block < server.end:
            for rest in all_chains(candidates, num_blocks, server.end):
                yield [server, *rest]


def cost_s(chain: Sequence[Candidate]) -> float:
    cost, block = 0.0, 0
    for server in chain:
        cost += server.cost_s(server.end - block)
        block = server.end
    return cost


SPANS = st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda span: span[0] != span[1]).map(sorted)
SECONDS = st.floats(0, 10)
SERVERS = st.lists(st.tuples(SPANS, SECONDS, SECONDS, st.one_of(st.just(0.0), SECONDS)), min_size=1, max_size=7).map(
    lambda rows: [
        candidate(f"peer{number}", *span, rtt_s=rtt_s, block_s=block_s, penalty_s=penalty_s)
        for number, (span, rtt_s, block_s, penalty_s) in enumerate(rows)
    ]
)


@settings(max_examples=300)
@given(SERVERS)
def test_no_chain_is_cheaper(candidates: list[Candidate]) -> None:
    chains = list(all_chains(candidates, 6))
    assume(chains)
    chain = shortest_chain(candidates, 6)
    by_id = {server.peer_id: server for server in candidates}
    assert [hop.start for hop in chain] == [0, *(hop.end for hop in chain[:-1])]
    assert chain[-1].end == 6
    for hop in chain:
        assert by_id[hop.peer_id].start <= hop.start < hop.end == by_id[hop.peer_id].end
    found = cost_s([by_id[hop.peer_id] for hop in chain])
    assert math.isclose(found, min(map(cost_s, chains)), rel_tol=1e-9, abs_tol=1e-9)


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
    assume(list(all_chains(candidates, 6)))
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


def test_an_infinite_penalty_is_still_a_way() -> None:
    banned, good = candidate("a", 0, 4, penalty_s=math.inf), candidate("z", 0, 4, rtt_s=1000.0)
    assert [hop.peer_id for hop in shortest_chain([banned, good], 4)] == ["z"]
    assert [hop.peer_id for hop in shortest_chain([banned], 4)] == ["a"]


def test_ties_are_broken_the_same_way_everywhere() -> None:
    twins = [candidate("b", 0, 4), candidate("a", 0, 4)]
    assert shortest_chain(twins, 4) == shortest_chain(twins[::-1], 4) == (Hop(peer_id="a", start=0, end=4),)


@pytest.mark.parametrize(
    ("blocks", "text"),
    [([3], "blocks 3:4"), ([3, 4, 9, 10, 11], "blocks 3:5, 9:12"), ([0, 2, 4], "blocks 0:1, 2:3, 4:5")],
)
def test_blocks_are_named_as_half_open_spans(blocks: list[int], text: str) -> None:
    assert name_blocks(blocks) == text
