import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals.errors import BlocksError, MemoryShortage
from geopetals.plan import Chain, Hop, Placement, Span, spans_of
from tests.problems import make_placement, make_problem, seeds


@given(seed=seeds, servers=st.integers(1, 6), blocks=st.integers(1, 12))
def test_gaps_are_exactly_the_blocks_that_no_server_holds(seed: int, servers: int, blocks: int) -> None:
    placement = make_placement(seed, servers=servers, blocks=blocks)
    held = {b for s in range(servers) for b in range(int(placement.starts[s]), int(placement.ends[s]))}
    missing = [block for gap in placement.gaps() for block in range(gap.start, gap.end)]
    assert missing == sorted(set(range(blocks)) - held)
    assert placement.covers() == (not missing)
    assert placement.replicas().sum() == placement.held.sum()


def test_a_server_without_blocks_has_no_span() -> None:
    placement = Placement.of([(0, 3), None, Span(1, 4)], 4)
    assert [placement.span(server) for server in range(3)] == [Span(0, 3), None, Span(1, 4)]
    assert placement == Placement(num_blocks=4, starts=np.array([0, 0, 1]), ends=np.array([3, 0, 4]))


@pytest.mark.parametrize("span", [(2, 2), (-1, 2), (3, 6), (3, 1)])
def test_a_span_outside_the_model_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(BlocksError, match="Server 1"):
        Placement.of([(0, 5), span], 5)


def test_a_placement_is_checked_against_memory_limits_and_pins() -> None:
    problem = make_problem(servers=2, blocks=6, room=2.0, pinned=((0, 1), None))
    with pytest.raises(BlocksError, match="Server 0 is pinned"):
        Placement.of([(1, 2), (0, 6)], 6).check(problem)
    with pytest.raises(MemoryShortage, match="server 0 do not fit"):
        Placement.of([(0, 6), (0, 6)], 6).check(make_problem(servers=2, blocks=6, room=0.2))
    with pytest.raises(BlocksError, match="plan again"):
        Placement.of([(0, 6)], 6).check(problem)


def test_a_chain_goes_on_where_the_server_before_ended() -> None:
    chain = Chain((Hop(3, 0, 4), Hop(1, 4, 5)))
    assert (chain.servers, chain.start, chain.end, len(chain)) == ((3, 1), 0, 5, 2)
    with pytest.raises(BlocksError, match="does not go on at block 4"):
        Chain((Hop(3, 0, 4), Hop(1, 5, 6)))
    with pytest.raises(BlocksError, match="at least one server"):
        Chain(())


def test_spans_of_blocks_are_maximal() -> None:
    assert spans_of([0, 1, 4, 6, 7]) == (Span(0, 2), Span(4, 5), Span(6, 8))
