"""What a run's outcomes amount to, under the names of `vllm bench serve`, in times of the device and links described
(the wall clock's divided by the dilation).

TTFT and E2EL count from when the request was due, not from when a late client sent it. TPOT is (E2EL - TTFT) /
(output tokens - 1) of each request, ITL each gap between two tokens.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geopetals.bench.run import Outcome
from geopetals.errors import UnsupportedInput

_PERCENTILES = (50, 90, 99)
METRICS = ("ttft", "tpot", "itl", "e2el")


def summarize(
    outcomes: Sequence[Outcome], *, duration_s: float, dilation: float, goodput_ms: Mapping[str, float]
) -> dict[str, float | int | None]:
    """Flat figures. Failed requests count in `failed` alone, their tokens nowhere; None where there is no value."""
    done = [outcome for outcome in outcomes if outcome.failure is None]
    seconds = duration_s / dilation
    sent, made = sum(len(outcome.request.prompt) for outcome in done), sum(len(outcome.tokens) for outcome in done)
    summary: dict[str, float | int | None] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": sent,
        "total_output_tokens": made,
        "request_throughput": _rate(len(done), seconds),
        "output_throughput": _rate(made, seconds),
        "total_token_throughput": _rate(sent + made, seconds),
        "max_concurrent_requests": _most_at_once(outcomes, dilation),
    }
    if goodput_ms:
        good = sum(_is_good(outcome, dilation, goodput_ms) for outcome in done)
        summary |= {"request_goodput": _rate(good, seconds), "good_share": good / len(outcomes) if outcomes else None}
    for name, values in _metrics(done, dilation).items():
        summary |= _statistics(name, values)
    return summary


def median_itl_s(outcomes: Sequence[Outcome]) -> float | None:
    """On the wall clock."""
    gaps = [gap for outcome in outcomes if outcome.failure is None for gap in np.diff(outcome.token_s).tolist()]
    return float(np.median(gaps)) if gaps else None


def failures(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How often each reason occurred."""
    return dict(Counter(outcome.failure for outcome in outcomes if outcome.failure is not None).most_common())


def tokens_digest(outcomes: Sequence[Outcome]) -> str:
    """Equal for two runs that answered the same requests with the same tokens."""
    text = ";".join(f"{outcome.request.number}:{','.join(map(str, outcome.tokens))}" for outcome in outcomes)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_outcome(outcome: Outcome, dilation: float) -> dict[str, Any]:
    """One request, for --details."""
    request = outcome.request
    return {
        "number": request.number,
        "host": request.host,
        "arrival_s": request.arrival_s,
        "input_len": len(request.prompt),
        "output_len": request.output_tokens,
        "failure": outcome.failure,
        "message": outcome.message,
        "late_s": None if outcome.late_s is None else outcome.late_s / dilation,
        "wait_s": None if outcome.wait_s is None else outcome.wait_s / dilation,
        "token_s": [at / dilation for at in outcome.token_s],
        "tokens": outcome.tokens,
        "chain": outcome.chain,
    }


def read_goodput(texts: Sequence[str]) -> dict[str, float]:
    """vLLM's `ttft:500 tpot:100`: limits in ms that a good request keeps, all of them."""
    limits = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in METRICS or name == "itl" or not limit > 0:
            raise UnsupportedInput(f"{text!r} is no service level: write ttft:500, tpot:100 or e2el:20000 (ms).")
        limits[name] = limit
    return limits


def _request_metrics(outcome: Outcome, dilation: float) -> dict[str, float]:
    first, last, steps = outcome.token_s[0], outcome.token_s[-1], len(outcome.token_s) - 1
    metrics = {"ttft": 1000 * first / dilation, "e2el": 1000 * last / dilation}
    return metrics | ({"tpot": 1000 * (last - first) / steps / dilation} if steps else {})


def _metrics(done: Sequence[Outcome], dilation: float) -> dict[str, list[float]]:
    each = [_request_metrics(outcome, dilation) for outcome in done]
    found = {name: [metrics[name] for metrics in each if name in metrics] for name in ("ttft", "tpot", "e2el")}
    found["itl"] = [1000 * gap / dilation for outcome in done for gap in np.diff(outcome.token_s).tolist()]
    found["wait"] = [1000 * outcome.wait_s / dilation for outcome in done if outcome.wait_s is not None]
    return found


def _statistics(name: str, values: Sequence[float]) -> dict[str, float | None]:
    figures: dict[str, float | None] = {
        f"mean_{name}_ms": float(np.mean(values)) if values else None,
        f"median_{name}_ms": float(np.median(values)) if values else None,
        f"std_{name}_ms": float(np.std(values)) if values else None,
    }
    return figures | {f"p{q}_{name}_ms": float(np.percentile(values, q)) if values else None for q in _PERCENTILES}


def _is_good(outcome: Outcome, dilation: float, limits_ms: Mapping[str, float]) -> bool:
    metrics = _request_metrics(outcome, dilation)
    return all(metrics.get(name, 0.0) <= limit for name, limit in limits_ms.items())


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _most_at_once(outcomes: Sequence[Outcome], dilation: float) -> int:
    changes = []
    for outcome in outcomes:
        if outcome.token_s and outcome.request.arrival_s is not None:
            changes += [
                (outcome.request.arrival_s, 1),
                (outcome.request.arrival_s + outcome.token_s[-1] / dilation, -1),
            ]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most
