"""The same seed asks the same, and arrivals are what was ordered."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals.bench.lengths import Length, read_length
from geopetals.bench.trace import TraceRow, read_trace
from geopetals.bench.workload import Load, Request, draw, replay
from geopetals.errors import UnsupportedInput

FIXED = Length(low=8, high=8)


def load(requests: int = 200, *, rates: dict[str, float] | None = None, **more: object) -> Load:
    figures = {"prompt_tokens": FIXED, "output_tokens": FIXED, **more}
    return Load(rates=rates or {"a": 2.0, "b": 6.0}, requests=requests, **figures)  # type: ignore[arg-type]


def times(requests: list[Request], host: str | None = None) -> list[float]:
    return [r.arrival_s for r in requests if r.arrival_s is not None and host in (None, r.host)]


@given(seed=st.integers(0, 2**63 - 1), count=st.integers(1, 40), warmups=st.integers(0, 3))
def test_the_same_seed_asks_the_same(seed: int, count: int, warmups: int) -> None:
    ordered = load(count, warmups=warmups, prompt_tokens=Length(low=1, high=9))
    first, second = (draw(ordered, vocabulary=100, seed=seed) for _ in range(2))
    assert first == second
    assert len(first) == count + 2 * warmups
    assert [request.number for request in first] == list(range(len(first)))
    assert times(first) == sorted(times(first))
    assert all(3 <= token < 100 for request in first for token in request.prompt)


def test_another_seed_asks_something_else() -> None:
    assert draw(load(), vocabulary=100, seed=1) != draw(load(), vocabulary=100, seed=2)


def test_poisson_arrivals_have_the_rates_of_their_hosts() -> None:
    requests = draw(load(8000), vocabulary=100, seed=0)
    lasted_s = times(requests)[-1]
    for host, rate in (("a", 2.0), ("b", 6.0)):
        gaps = np.diff(times(requests, host))
        assert len(gaps) / lasted_s == pytest.approx(rate, rel=0.1)
        assert np.std(gaps) / np.mean(gaps) == pytest.approx(1, rel=0.1)  # exponential


def test_a_constant_rate_has_equal_gaps() -> None:
    requests = draw(load(50, rates={"a": 4.0}, burstiness=math.inf), vocabulary=100, seed=0)
    assert np.diff(times(requests)) == pytest.approx(0.25)


def test_an_infinite_rate_asks_all_at_once() -> None:
    assert set(times(draw(load(9, rates={"a": math.inf}), vocabulary=100, seed=0))) == {0.0}


def test_warm_ups_come_first_and_have_no_time() -> None:
    requests = draw(load(5, warmups=2), vocabulary=100, seed=0)
    assert [(r.host, r.arrival_s) for r in requests[:4]] == [("a", None), ("a", None), ("b", None), ("b", None)]
    assert all(request.arrival_s is not None for request in requests[4:])


def test_a_trace_keeps_its_arrivals_and_lengths() -> None:
    rows = [
        TraceRow(arrival_s=0.0, prompt_tokens=3, output_tokens=5),
        TraceRow(arrival_s=2.5, prompt_tokens=7, output_tokens=1),
    ]
    requests = replay(load(9), rows, vocabulary=100, seed=0)
    assert [(r.arrival_s, len(r.prompt), r.output_tokens) for r in requests] == [(0.0, 3, 5), (2.5, 7, 1)]
    assert {request.host for request in requests} <= {"a", "b"}


@pytest.mark.parametrize("rates", [{}, {"a": 0.0}, {"a": float("nan")}, {"a": -1.0}])
def test_rates_that_make_no_sense_are_refused(rates: dict[str, float]) -> None:
    with pytest.raises(UnsupportedInput, match="rate"):
        Load(rates=rates, requests=1, prompt_tokens=FIXED, output_tokens=FIXED)


@pytest.mark.parametrize(
    ("text", "low", "high"), [("128", 128, 128), ("64-256", 64, 256), ("100~0.5:400", 1, 400), ("5~0:9", 5, 5)]
)
def test_lengths_stay_within_their_limits(text: str, low: int, high: int) -> None:
    drawn = [read_length(text).draw(np.random.default_rng(number)) for number in range(200)]
    assert low <= min(drawn) <= max(drawn) <= high


def test_a_log_normal_length_has_its_median() -> None:
    rng = np.random.default_rng(0)
    assert np.median([read_length("100~0.8:4000").draw(rng) for _ in range(4000)]) == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("text", ["", "0", "9-3", "-4", "1.5", "12~:4", "5~0.5", "99999999", "4 5"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedInput, match="length"):
        read_length(text)


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:13.9799600,110,27
"""
AZURE_2024 = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
PLAIN = "arrival_s,prompt_tokens,output_tokens\n12.5,10,3\n11,20,4\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "trace.csv"
    file.write_text(text)
    return file


def test_azures_traces_are_read(tmp_path: Path) -> None:
    rows = read_trace(write(tmp_path, AZURE))
    assert [(r.prompt_tokens, r.output_tokens) for r in rows] == [(4808, 10), (3180, 8), (110, 27)]
    assert [r.arrival_s for r in rows] == pytest.approx([0.0, 0.052, 10.0], abs=1e-5)
    assert len(read_trace(write(tmp_path, AZURE_2024))) == 1


def test_a_trace_can_be_replayed_faster_and_without_long_requests(tmp_path: Path) -> None:
    rows = read_trace(write(tmp_path, AZURE), speed=2.0, max_tokens=3500)
    assert [r.prompt_tokens for r in rows] == [3180, 110]
    assert rows[1].arrival_s == pytest.approx(4.974, abs=1e-5)


def test_a_plain_trace_is_sorted_by_arrival(tmp_path: Path) -> None:
    rows = read_trace(write(tmp_path, PLAIN))
    assert rows == [
        TraceRow(arrival_s=0.0, prompt_tokens=20, output_tokens=4),
        TraceRow(arrival_s=1.5, prompt_tokens=10, output_tokens=3),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "no column"),
        ("", "no column"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no request"),
        ("arrival_s,prompt_tokens,output_tokens\n1,x,2\n", "line 2"),
        ("arrival_s,prompt_tokens,output_tokens\n1,2\n", "line 2"),
        ("arrival_s,prompt_tokens,output_tokens\nyesterday,1,2\n", "line 2"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,1,2\n", "line 2"),
        ("arrival_s,prompt_tokens,output_tokens\n1,1,99999999999\n", "line 2"),
    ],
)
def test_a_broken_trace_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UnsupportedInput, match=said):
        read_trace(write(tmp_path, text))


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInput, match="cannot be read"):
        read_trace(tmp_path / "absent.csv")
