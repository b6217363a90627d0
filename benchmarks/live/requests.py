"""What is asked in a run, the same of every system; and the closed loop: one session at a time."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil

from geopetals.bench.lengths import Length
from geopetals.bench.run import Outcome, RunRecord, outcome_of, run_load
from geopetals.bench.workers import Workers, WorkerSpec, started
from geopetals.bench.workload import Load, Request, draw
from geopetals.cluster import Cluster
from geopetals.errors import SwarmFailure
from live.scenario import LiveScenario
from tests.models import VOCABULARY

_TIMEOUT_S = 600.0
_WARM_UP_TOKENS = 4
ONE = "one"


def load_of(scenario: LiveScenario, cluster: Cluster, load: str, rate_per_s: float) -> Load:
    """All clients by their share of the demand."""
    demand = cluster.demand_per_s()
    rates = {
        name: rate_per_s * own / sum(demand) for name, own in zip(scenario.client_names, demand, strict=True) if own > 0
    }
    return Load(
        rates=rates,
        requests=scenario.sessions[load],
        prompt_tokens=Length(low=scenario.prompt_tokens, high=scenario.prompt_tokens),
        output_tokens=Length(low=scenario.output_tokens, high=scenario.output_tokens),
        warmups=1,
    )


def drawn(scenario: LiveScenario, load: Load, *, order: int) -> list[Request]:
    """Another order of joining has other arrivals and prompts. To warm up, a few tokens are enough."""
    requests = draw(load, vocabulary=VOCABULARY, seed=scenario.seed * 1000 + order)
    return [
        request if request.arrival_s is not None else replace(request, output_tokens=_WARM_UP_TOKENS)
        for request in requests
    ]


def run(
    specs: Sequence[WorkerSpec],
    requests: Sequence[Request],
    *,
    closed: bool,
    dilation: float,
    before: Callable[[], object],
    after: Callable[[], object],
) -> RunRecord:
    """Closed: each request when the one before has its answer, arrivals do not count."""
    if not closed:
        return run_load(specs, lambda _: requests, dilation=dilation, timeout_s=_TIMEOUT_S, before=before, after=after)
    with started(specs) as workers:
        facts = workers.ready()
        for request in requests:
            if request.arrival_s is None:
                _ask(workers, request, dilation)
        before()
        cpu, began = psutil.cpu_times_percent(None), time.monotonic()
        outcomes = [_ask(workers, request, dilation) for request in requests if request.arrival_s is not None]
        duration_s = time.monotonic() - began
        cpu = psutil.cpu_times_percent(None)
        after()
        facts_after = workers.stop()
    return RunRecord(
        outcomes=outcomes,
        duration_s=duration_s,
        cpu_percent=100.0 - cpu.idle - getattr(cpu, "iowait", 0.0),
        facts_before=facts,
        facts_after=facts_after,
    )


def _ask(workers: Workers, request: Request, dilation: float) -> Outcome:
    """Raises SwarmFailure when no answer comes in time: what then follows would not be alone."""
    message = {"number": request.number, "prompt": request.prompt, "output_tokens": request.output_tokens}
    due = time.monotonic()
    workers[request.host].write_line(json.dumps(message).encode() + b"\n")
    got = workers.next_event(due + _TIMEOUT_S * dilation)
    if got is None:
        raise SwarmFailure(f"request {request.number} of {request.host} has no answer after {_TIMEOUT_S:.0f} s.")
    event = got[1]
    error = event["error"] or {}
    wrong = not error and len(event["tokens"]) != request.output_tokens
    failure = "WrongLength" if wrong else error.get("reason")
    return outcome_of(request, event, due=due, failure=failure, message=error.get("message"))
