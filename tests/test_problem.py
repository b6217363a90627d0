import numpy as np
import pytest

from geopetals.errors import BlocksError, GeoPetalsError, MemoryShortage, UnsupportedInput
from geopetals.problem import Contention, Problem
from tests.problems import make_problem


def changed(**fields: object) -> Problem:
    problem = make_problem(servers=3, blocks=6)
    values = {name: getattr(problem, name) for name in Problem.__dataclass_fields__}
    return Problem(**(values | fields))


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"num_blocks": 0}, UnsupportedInput, "num_blocks is 0"),
        ({"kv_bytes": float("nan")}, UnsupportedInput, "kv_bytes is nan"),
        ({"memory_bytes": [1e9, -1.0, 1e9]}, UnsupportedInput, "memory_bytes has a negative"),
        ({"decode_block_s": [0.1, 0.1]}, UnsupportedInput, "decode_block_s has shape"),
        ({"relay_decode_s": np.full((1, 3), np.nan)}, UnsupportedInput, "relay_decode_s has a negative or undefined"),
        ({"max_blocks": [1, 2, -1]}, UnsupportedInput, "max_blocks"),
        ({"pinned": ((0, 9), None, None)}, BlocksError, r"pinned\[0\] is \[0, 9\)"),
        ({"pinned": ((0, 5), None, None), "max_blocks": [4, 4, 4]}, BlocksError, "shorten the span or raise the limit"),
        ({"pinned": ((0, 6), None, None), "memory_bytes": [5e3, 1e9, 1e9]}, MemoryShortage, r"pinned\[0\] needs 6000"),
        ({"pinned": ((0, 1),)}, UnsupportedInput, "pinned has 1 entries for 3 servers"),
        ({"contention": Contention(floor_s=np.ones(2), session_s=np.ones(2))}, UnsupportedInput, "contention has 2"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, object], error: type[GeoPetalsError], words: str) -> None:
    with pytest.raises(error, match=words):
        changed(**fields)


def test_values_cannot_be_changed_afterwards() -> None:
    memory = np.array([5e3, 6e3, 7e3])
    problem = changed(memory_bytes=memory)
    memory[0] = 0
    assert problem.memory_bytes[0] == 5e3
    with pytest.raises(ValueError, match="read-only"):
        problem.memory_bytes[0] = 1


def test_an_infinite_delay_is_allowed_as_an_absent_link() -> None:
    assert np.isinf(changed(relay_decode_s=[[np.inf, 1.0, 1.0]]).relay_decode_s[0, 0])


def test_slots_are_the_whole_caches_that_fit_beside_the_blocks() -> None:
    problem = changed(memory_bytes=[3e3, 2.05e3, 1e3], kv_bytes=100.0)
    assert problem.slots(np.array([2, 2, 2])).tolist() == [10, 0, 0]
