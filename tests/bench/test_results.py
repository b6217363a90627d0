"""Figures by hand, and the rule by which a run is rejected."""

import math
from typing import Any

import pytest

from geopetals.bench.results import failures, median_itl_s, read_goodput, summarize, tokens_digest
from geopetals.bench.rules import judge
from geopetals.bench.run import Outcome
from geopetals.bench.workload import Request
from geopetals.errors import UnsupportedInput


def outcome(number: int = 0, *, arrival_s: float = 0.0, token_s: tuple[float, ...] = (), **more: Any) -> Outcome:
    request = Request(number=number, host="a", arrival_s=arrival_s, prompt=(5, 6, 7), output_tokens=len(token_s))
    return Outcome(request=request, token_s=token_s, tokens=tuple(range(len(token_s))), late_s=0.0, **more)


ANSWERED = outcome(0, token_s=(1.0, 1.5, 2.5), wait_s=0.25)
SHORT = outcome(1, arrival_s=2.0, token_s=(0.5,), wait_s=0.1)
FAILED = outcome(2, arrival_s=1.0, token_s=(0.1, 0.2), failure="ServerFull")


def figures(*outcomes: Outcome, dilation: float = 1.0, **goodput_ms: float) -> dict[str, Any]:
    return summarize(outcomes, duration_s=10.0, dilation=dilation, goodput_ms=goodput_ms)


def test_the_figures_of_vllm() -> None:
    found = figures(ANSWERED, SHORT, FAILED)
    assert found["completed"] == 2
    assert found["failed"] == 1
    assert found["total_input_tokens"] == 6
    assert found["total_output_tokens"] == 4
    assert found["request_throughput"] == pytest.approx(0.2)
    assert found["output_throughput"] == pytest.approx(0.4)
    assert found["mean_ttft_ms"] == pytest.approx(750)
    assert found["p99_ttft_ms"] == pytest.approx(995)
    assert found["mean_tpot_ms"] == pytest.approx(750)  # (2.5 - 1.0) / 2 of the one that has more than one token
    assert found["median_itl_ms"] == pytest.approx(750)
    assert found["mean_e2el_ms"] == pytest.approx(1500)
    assert found["mean_wait_ms"] == pytest.approx(175)


def test_dilated_times_are_divided() -> None:
    plain, dilated = figures(ANSWERED, SHORT), figures(ANSWERED, SHORT, dilation=4.0)
    for name, value in plain.items():
        if name.endswith("_ms") or name == "duration":
            assert dilated[name] == pytest.approx(value / 4)
        elif name.endswith("throughput"):
            assert dilated[name] == pytest.approx(value * 4)


def test_sessions_at_once() -> None:
    apart = [outcome(0, arrival_s=0.0, token_s=(1.0,)), outcome(1, arrival_s=2.0, token_s=(1.0,))]
    assert figures(*apart)["max_concurrent_requests"] == 1
    assert figures(*apart, outcome(2, arrival_s=0.5, token_s=(2.0,)))["max_concurrent_requests"] == 2


def test_a_good_request_keeps_all_limits() -> None:
    assert figures(ANSWERED, SHORT, FAILED, ttft=2000)["request_goodput"] == pytest.approx(0.2)
    assert figures(ANSWERED, SHORT, FAILED, ttft=2000, tpot=100)["request_goodput"] == pytest.approx(0.1)
    assert figures(ANSWERED, SHORT, FAILED, ttft=2000)["good_share"] == pytest.approx(2 / 3)
    assert "request_goodput" not in figures(ANSWERED)


def test_a_run_without_answers_has_no_figures() -> None:
    found = figures(FAILED)
    assert found["mean_ttft_ms"] is None
    assert found["request_throughput"] == 0
    assert figures()["completed"] == 0


def test_failures_are_counted_by_reason() -> None:
    assert failures([ANSWERED, FAILED, outcome(3, failure="Timeout"), outcome(4, failure="ServerFull")]) == {
        "ServerFull": 2,
        "Timeout": 1,
    }


def test_the_digest_tells_tokens_apart() -> None:
    assert tokens_digest([ANSWERED, SHORT]) == tokens_digest([ANSWERED, SHORT])
    assert tokens_digest([ANSWERED, SHORT]) != tokens_digest([ANSWERED, outcome(1, token_s=(0.5, 0.6))])


def test_service_levels_are_written_as_for_vllm() -> None:
    assert read_goodput(["ttft:500", "e2el:9e3"]) == {"ttft": 500, "e2el": 9000}


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:-1", "ttft:nan", "speed:4", "itl:4", ":"])
def test_what_is_no_service_level_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedInput, match="service level"):
        read_goodput([text])


def test_the_median_itl_is_of_the_wall_clock() -> None:
    assert median_itl_s([ANSWERED, SHORT, FAILED]) == pytest.approx(0.75)
    assert median_itl_s([SHORT, FAILED]) is None


GOOD = {"cpu_percent": 59.0, "late_p99_s": {"arrivals": 0.004, "packets": 0.005}, "median_itl_s": 0.1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"cpu_percent": 61.0}, "busy 61 %"),
        ({"late_p99_s": {"arrivals": 0.0051}}, "arrivals were 5.10 ms late"),
        ({"late_p99_s": {"packets": math.inf}}, "packets"),
        ({"median_itl_s": None}, "no request"),
        ({"dilation": 2.0, "dilations": {"the network": 2.0}}, None),
        ({"dilation": 2.0, "dilations": {"the network": 1.0}}, "the network is dilated 1 times, the run 2 times"),
    ],
)
def test_the_rule_that_rejects_a_run(change: dict[str, Any], said: str | None) -> None:
    verdict = judge(**{**GOOD, **change})
    assert verdict["accepted"] == (said is None)
    assert (said or "") in " ".join(verdict["reasons"])
    assert verdict["cpu_percent"] == {**GOOD, **change}["cpu_percent"]
