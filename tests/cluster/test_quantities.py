import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals.cluster.errors import ClusterError
from geopetals.cluster.quantities import BANDWIDTH, DURATION, MEMORY, RATE, Unit

READ = [
    (MEMORY, "24 GB", 24e9),
    (MEMORY, "9.1GB", 9_100_000_000),
    (MEMORY, "4 GiB", 4 * 2**30),
    (MEMORY, "56 KiB", 57344),
    (DURATION, "35 ms", 0.035),
    (DURATION, "16.2488 ms", 0.0162488),
    (DURATION, "250 us", 0.00025),
    (DURATION, "1e-3 s", 0.001),
    (BANDWIDTH, "100 Mbit/s", 1e8),
    (BANDWIDTH, "1 Gbps", 1e9),
    (RATE, "2/min", 1 / 30),
    (RATE, "0.5 /s", 0.5),
]


@pytest.mark.parametrize(("unit", "text", "value"), READ)
def test_units_are_read_exactly(unit: Unit, text: str, value: float) -> None:
    assert unit.parse(text) == value


REFUSED: list[tuple[Unit, object, str]] = [
    (MEMORY, 24, "24 has no unit: write it with one, for example 24 GB"),
    (MEMORY, "24", "has no unit"),
    (MEMORY, "24 gb", "write GB"),
    (MEMORY, "24 Gbit", "no unit of amount of memory"),
    (DURATION, "35 ms extra", "no unit of time"),
    (DURATION, "fast", "no time"),
    (DURATION, None, "None is no time"),
    (DURATION, True, "True is no time"),
    (BANDWIDTH, "100 MB/s", "no unit of bandwidth"),
    (RATE, "2 per minute", "no unit of rate"),
    (MEMORY, "9" * 1000 + " GB", "no amount of memory"),
]


@pytest.mark.parametrize(("unit", "value", "words"), REFUSED)
def test_what_is_no_quantity_is_refused_with_an_example(unit: Unit, value: object, words: str) -> None:
    with pytest.raises(ClusterError, match=words) as caught:
        unit.parse(value)
    assert "for example" in str(caught.value)


@pytest.mark.parametrize("unit", [DURATION, BANDWIDTH, RATE], ids=lambda unit: unit.what)
@given(value=st.floats(min_value=0, max_value=1e15))
def test_what_is_written_is_read_as_the_same_number(unit: Unit, value: float) -> None:
    assert unit.parse(unit.format(value)) == value


@given(value=st.integers(min_value=0, max_value=2**53))
def test_bytes_are_written_and_read_exactly(value: int) -> None:
    assert MEMORY.parse(MEMORY.format(value)) == value


def test_people_get_the_unit_that_reads_best() -> None:
    assert MEMORY.format(24e9) == "24 GB"
    assert DURATION.format(0.0162488) == "16.2488 ms"
    assert RATE.format(1 / 30) == "2/min"
    assert BANDWIDTH.format(1e8) == "100 Mbit/s"
