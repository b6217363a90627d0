import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from geopetals.placement.windows import largest_sum, ranks, weakest


@given(levels=st.lists(st.integers(0, 3), min_size=1, max_size=12), data=st.data())
def test_the_weakest_window_is_the_first_in_lexicographic_order(levels: list[int], data: st.DataObject) -> None:
    length = data.draw(st.integers(1, len(levels)))
    windows = [sorted(levels[start : start + length]) for start in range(len(levels) - length + 1)]
    assert weakest(np.array(levels), length) == windows.index(min(windows))


def test_noise_in_the_last_bits_does_not_decide() -> None:
    values = np.array([0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2])
    assert largest_sum(values, 2, np.ones(3, dtype=bool)) == 0
    assert ranks(np.array([0.3, 0.1 + 0.2, 0.2])).tolist() == [1, 1, 0]
    assert weakest(ranks(values), 2) == 0


def test_only_allowed_windows_are_chosen() -> None:
    assert largest_sum(np.array([5.0, 5.0, 1.0, 1.0]), 2, np.array([False, False, True])) == 2


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=10))
def test_ranks_keep_the_order(values: list[float]) -> None:
    found = ranks(np.array(values))
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if a < b * (1 - 1e-6) - 1e-12:
                assert found[i] < found[j]
            if a == b:
                assert found[i] == found[j]
