"""The open loop, with clients that need no swarm."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from geopetals.bench.run import Outcome, RunRecord, run_load
from geopetals.bench.workers import WorkerSpec
from geopetals.bench.workload import Request
from geopetals.errors import SwarmFailure

FAKE = Path(__file__).with_name("fake_client.py")
GOOD, FAILS, SHORT, HANGS, DIES = 10, 1, 2, 3, 4


def spec(host: str = "a", **config: Any) -> WorkerSpec:
    return WorkerSpec(
        host=host, command=[sys.executable, str(FAKE)], config=config, environment=lambda folder: dict(os.environ)
    )


def asked(*kinds: int, host: str = "a", gap_s: float = 0.0, first: int = 0, output_tokens: int = 3) -> list[Request]:
    return [
        Request(number=first + i, host=host, arrival_s=i * gap_s, prompt=(kind, first + i), output_tokens=output_tokens)
        for i, kind in enumerate(kinds)
    ]


def run(requests: Sequence[Request], *specs: WorkerSpec, **options: Any) -> RunRecord:
    return run_load(specs or [spec()], lambda vocabulary: requests, **options)


def failures(outcomes: Sequence[Outcome]) -> list[str | None]:
    return [outcome.failure for outcome in outcomes]


def test_every_request_is_answered_once_in_order_of_arrival() -> None:
    record = run(asked(GOOD, GOOD, GOOD, gap_s=0.02))
    assert failures(record.outcomes) == [None] * 3
    assert [outcome.request.number for outcome in record.outcomes] == [0, 1, 2]
    for outcome in record.outcomes:
        assert outcome.tokens == (0, 1, 2)
        assert 0 <= (outcome.late_s or 0) <= (outcome.wait_s or 0) <= outcome.token_s[0] <= outcome.token_s[-1]
    assert record.duration_s >= 0.04
    assert 0 <= record.cpu_percent <= 100


def test_requests_do_not_wait_for_earlier_ones() -> None:
    """Eight sessions of 0.3 s, sent within 0.07 s: one after another they would take 2.4 s."""
    record = run(asked(*[GOOD] * 8, gap_s=0.01), spec(token_s=0.1))
    starts = [(o.request.arrival_s or 0) + (o.late_s or 0) for o in record.outcomes]
    ends = [(o.request.arrival_s or 0) + o.token_s[-1] for o in record.outcomes]
    assert max(starts) < min(ends)


def test_failures_have_their_reasons() -> None:
    record = run(asked(GOOD, FAILS, SHORT, HANGS), timeout_s=1.5)
    assert failures(record.outcomes) == [None, "TimeoutError", "WrongLength", "Timeout"]
    assert record.outcomes[1].message == "the swarm is slow"
    assert record.facts_after == {}  # a client that hangs cannot say what it knows


def test_hosts_have_clients_of_their_own() -> None:
    requests = [*asked(GOOD, GOOD, host="a"), *asked(GOOD, host="b", first=2)]
    record = run(requests, spec("a"), spec("b"))
    assert {host: len(facts["seen"]) for host, facts in record.facts_after.items()} == {"a": 2, "b": 1}


def test_warm_ups_come_before_and_are_not_counted() -> None:
    warm = [
        Request(number=n, host="a", arrival_s=None, prompt=(kind,), output_tokens=1)
        for n, kind in enumerate((FAILS, 9))
    ]
    order: list[str] = []
    record = run(
        [*warm, *asked(GOOD, first=2)], before=lambda: order.append("before"), after=lambda: order.append("after")
    )
    assert [outcome.request.number for outcome in record.outcomes] == [2]
    assert record.facts_after["a"]["seen"] == [[FAILS], [9], [GOOD, 2]]
    assert order == ["before", "after"]


def test_dilation_stretches_arrivals_and_patience() -> None:
    record = run(asked(GOOD, GOOD, gap_s=0.1), spec(token_s=0.2), dilation=3.0, timeout_s=0.4)
    assert failures(record.outcomes) == [None, None]  # 0.6 s of 1.2 s
    assert record.duration_s >= 0.3 + 0.6


def test_the_vocabulary_is_what_all_clients_have() -> None:
    sizes: list[int] = []

    def draw(vocabulary: int) -> list[Request]:
        sizes.append(vocabulary)
        return []

    record = run_load([spec()], draw)
    assert sizes == [50]
    assert record.outcomes == []


@pytest.mark.parametrize(
    "requests", [asked(DIES), [Request(number=0, host="a", arrival_s=None, prompt=(DIES,), output_tokens=1)]]
)
def test_a_client_that_dies_fails_the_run(requests: list[Request]) -> None:
    with pytest.raises(SwarmFailure, match="client of host a has ended"):
        run(requests)


def test_a_client_that_cannot_open_its_model_says_why() -> None:
    with pytest.raises(SwarmFailure, match="no such model"):
        run([], spec("a"), spec("b", refuses="no such model"))


def test_no_process_is_left_when_the_run_is_interrupted() -> None:
    def interrupt(vocabulary: int) -> list[Request]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_load([spec("a"), spec("b")], interrupt)
    deadline = time.monotonic() + 5
    while any(FAKE.name in " ".join(child.cmdline()) for child in psutil.Process().children()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
