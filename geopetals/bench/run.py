"""One run: requests are sent when they are due, whatever became of those before (an open loop)."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from geopetals.bench.workers import Workers, WorkerSpec, started
from geopetals.bench.workload import Request
from geopetals.progress import Reporter, Silent

_LEAD_S = 0.5
TIMEOUT = "Timeout"

Facts = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one request. Seconds since its arrival was due, on the wall clock (not divided by the dilation).

    `late_s`: from then until the client began. `wait_s`: until its attention caches were reserved. `token_s`: until
    each token. `failure` is None, or why not all tokens came: an error class, "Timeout" or "WrongLength".
    """

    request: Request
    late_s: float | None = None
    wait_s: float | None = None
    token_s: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    chain: tuple[tuple[str, int, int], ...] = ()
    failure: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run as it happened. `duration_s`: from the first arrival to the last answer; `cpu_percent`: of all cores."""

    outcomes: Sequence[Outcome]
    duration_s: float
    cpu_percent: float
    facts_before: Facts
    facts_after: Facts = field(default_factory=dict)


def run_load(
    specs: Sequence[WorkerSpec],
    draw: Callable[[int], Sequence[Request]],
    *,
    dilation: float = 1.0,
    timeout_s: float = 600.0,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
    reporter: Reporter = Silent(),  # noqa: B008
) -> RunRecord:
    """Start a client on every host, warm up, send what `draw(vocabulary)` gives, wait for the answers.

    Arrivals are `dilation` times as far apart as drawn. A request that is not answered `timeout_s` (times the
    dilation) after its arrival has failed. `before` and `after` are called where the measured part begins and ends.
    Raises SwarmFailure when a client cannot start or dies.
    """
    with started(specs) as workers:
        facts = workers.ready()
        requests = draw(min(int(known["vocabulary"]) for known in facts.values()))
        reporter.line(f"{len(workers.hosts)} clients are ready")
        _warm_up(workers, [request for request in requests if request.arrival_s is None], timeout_s * dilation)
        measured = [request for request in requests if request.arrival_s is not None]
        before()
        cpu = psutil.cpu_times()
        outcomes, duration_s = _Run(workers, measured, dilation, timeout_s * dilation).outcomes()
        cpu_percent = _busy_percent(cpu, psutil.cpu_times())
        after()
        # A client that still works on a request that timed out would not stop: it is ended.
        timed_out = any(outcome.failure == TIMEOUT for outcome in outcomes)
        facts_after = {} if timed_out else workers.stop()
    return RunRecord(
        outcomes=outcomes,
        duration_s=duration_s,
        cpu_percent=cpu_percent,
        facts_before=facts,
        facts_after=facts_after,
    )


def _warm_up(workers: Workers, requests: Sequence[Request], timeout_s: float) -> None:
    """Each host's own, one after another; connections are then open and code is loaded. Failures are no matter here."""
    waiting = {host: [request for request in requests if request.host == host] for host in workers.hosts}
    waiting = {host: own for host, own in waiting.items() if own}
    for host, own in waiting.items():
        workers[host].write_line(_line(own.pop(0)))
    deadline = time.monotonic() + timeout_s * max(1, len(requests))
    while waiting and (got := workers.next_event(deadline)) is not None:
        host, _ = got
        if waiting[host]:
            workers[host].write_line(_line(waiting[host].pop(0)))
        else:
            del waiting[host]


class _Run:
    """The measured part."""

    def __init__(self, workers: Workers, requests: Sequence[Request], dilation: float, timeout_s: float) -> None:
        self._workers, self._dilation, self._timeout_s = workers, dilation, timeout_s
        self._requests = sorted(requests, key=lambda request: request.arrival_s or 0.0)
        self._due: dict[int, float] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._lines = {request.number: _line(request) for request in requests}
        self._by_number = {request.number: request for request in requests}
        self._last_s = 0.0

    def outcomes(self) -> tuple[list[Outcome], float]:
        start = time.monotonic() + _LEAD_S
        for request in self._requests:
            due = start + self._dilation * (request.arrival_s or 0.0)
            self._listen(until=due)
            self._due[request.number] = due
            self._workers[request.host].write_line(self._lines[request.number])
        self._listen(until=max(self._due.values(), default=start) + self._timeout_s, all_answered=True)
        for request in self._requests:
            if request.number not in self._outcomes:
                self._outcomes[request.number] = Outcome(request=request, failure=TIMEOUT)
        first = min(self._due.values(), default=start)
        return [self._outcomes[request.number] for request in self._requests], max(self._last_s - first, 0.0)

    def _listen(self, *, until: float, all_answered: bool = False) -> None:
        while not (all_answered and len(self._outcomes) == len(self._requests)):
            got = self._workers.next_event(until)
            if got is None:
                return
            self._note(got[1])

    def _note(self, event: Mapping[str, Any]) -> None:
        number = event["number"]
        if number not in self._by_number:
            return
        request, due = self._by_number[number], self._due[number]
        self._last_s = max(self._last_s, event["ended"])
        failure, message = None, None
        if event["error"] is not None:
            failure, message = event["error"]["reason"], event["error"]["message"]
        elif len(event["tokens"]) != request.output_tokens:
            failure, message = "WrongLength", f"{len(event['tokens'])} tokens instead of {request.output_tokens}"
        elif event["ended"] - due > self._timeout_s:
            failure = TIMEOUT
        self._outcomes[number] = outcome_of(request, event, due=due, failure=failure, message=message)


def outcome_of(
    request: Request, event: Mapping[str, Any], *, due: float, failure: str | None, message: str | None
) -> Outcome:
    """What a worker says of a request that was due then, on this machine's monotonic clock."""
    return Outcome(
        request=request,
        late_s=event["began"] - due,
        wait_s=None if event["opened"] is None else event["opened"] - due,
        token_s=tuple(at - due for at in event["times"]),
        tokens=tuple(event["tokens"]),
        chain=tuple((peer, start, end) for peer, start, end in event["chain"]),
        failure=failure,
        message=message,
    )


def _line(request: Request) -> bytes:
    message = {"number": request.number, "prompt": request.prompt, "output_tokens": request.output_tokens}
    return json.dumps(message).encode() + b"\n"


def _busy_percent(before: Any, after: Any) -> float:
    """Of all cores together, waiting for disks not counted."""
    spent = {name: getattr(after, name) - getattr(before, name) for name in after._fields}
    spent = {name: value for name, value in spent.items() if not name.startswith("guest")}
    idle, total = spent["idle"] + spent.get("iowait", 0.0), sum(spent.values())
    return 100 * (1 - idle / total) if total > 0 else 0.0
