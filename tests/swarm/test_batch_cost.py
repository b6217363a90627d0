import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals.swarm.batch_cost import BatchCost

seconds = st.floats(0.001, 1.0)


@given(seconds, seconds, st.integers(1, 40))
def test_a_straight_line_is_learnt_also_where_nothing_was_seen(fixed_s: float, each_s: float, size: int) -> None:
    cost = BatchCost()
    for seen in (1, 4, 8, 2) * 5:
        cost.note(seen, fixed_s + each_s * seen)
    assert cost.seconds(size) == pytest.approx(fixed_s + each_s * size, rel=1e-3)


@given(st.lists(st.tuples(st.integers(1, 64), seconds), max_size=20), st.integers(0, 64))
def test_a_cost_is_never_negative_and_nothing_costs_nothing(seen: list[tuple[int, float]], size: int) -> None:
    cost = BatchCost()
    for one in seen:
        cost.note(*one)
    assert cost.seconds(size) >= 0
    assert cost.seconds(0) == 0


def test_what_no_line_fits_is_known_by_size() -> None:
    """As of a kernel that is slow for two and three rows."""
    takes_s = {1: 0.027, 2: 0.040, 3: 0.047, 4: 0.039, 8: 0.030}
    cost = BatchCost()
    for _ in range(4):
        for size, seconds_ in takes_s.items():
            cost.note(size, seconds_)
    assert {size: cost.seconds(size) for size in takes_s} == takes_s


def test_a_hiccup_does_not_count() -> None:
    cost = BatchCost()
    for seconds_ in (0.03, 0.03, 0.9, 0.03):
        cost.note(2, seconds_)
        cost.note(1, 0.02)
    assert cost.seconds(2) == 0.03


def test_before_other_sizes_are_seen_a_larger_batch_is_hoped_to_be_cheap() -> None:
    cost = BatchCost()
    cost.note(1, 0.030)
    assert cost.seconds(2) == pytest.approx(0.033)


def test_what_was_long_ago_is_tried_again() -> None:
    """A batch of two that was once found to cost as much as two batches: the machine may have been busy."""
    cost = BatchCost()
    for _ in range(3):
        cost.note(2, 0.060)
    for _ in range(300):
        cost.note(1, 0.030)
    assert cost.seconds(2) < 0.060
