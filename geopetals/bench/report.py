"""A run's result as JSON and as text."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from geopetals.bench import results, rules
from geopetals.bench.provenance import provenance
from geopetals.bench.run import Facts, RunRecord
from geopetals.bench.systems import SystemUnderTest
from geopetals.bench.workload import Load


def result(
    record: RunRecord,
    *,
    system: SystemUnderTest,
    load: Load,
    command: str,
    seed: int,
    dilation: float,
    goodput_ms: Mapping[str, float],
    details: bool,
    wan: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything; times in `summary` and `requests` are divided by the dilation, those in `verdict` are not.

    `wan` is the status of the emulated network that the clients were in, with the lateness of this run.
    """
    outcomes = record.outcomes
    late = [outcome.late_s for outcome in outcomes if outcome.late_s is not None]
    late_p99_s = {"arrivals": float(np.percentile(late, 99))} if late else {}
    if wan is not None:
        late_p99_s["packets"] = float(wan["run"]["lateness"]["p99_s"])
    devices = _emulated(record)
    verdict = rules.judge(
        cpu_percent=record.cpu_percent,
        late_p99_s=late_p99_s,
        median_itl_s=results.median_itl_s(outcomes),
        dilation=dilation,
        dilations=_dilations(devices, wan),
    )
    found = {
        "provenance": provenance(command, seed=seed),
        "summary": results.summarize(outcomes, duration_s=record.duration_s, dilation=dilation, goodput_ms=goodput_ms),
        "failures": results.failures(outcomes),
        "verdict": verdict,
        "dilation": dilation,
        "emulated_devices": devices,
        "wan": wan,
        "system": system.system,
        "model": system.model,
        "load": _describe_load(load),
        "goodput_ms": dict(goodput_ms),
        "tokens_sha256": results.tokens_digest(outcomes),
        "clients": {"before": _without_devices(record.facts_before), "after": _without_devices(record.facts_after)},
    }
    if details:
        found["requests"] = [results.describe_outcome(outcome, dilation) for outcome in outcomes]
    return found


def as_text(found: Mapping[str, Any]) -> str:
    """For people."""
    summary, verdict = found["summary"], found["verdict"]
    lines = [
        f"{found['system']}: {summary['completed']} requests answered in {summary['duration']:.1f} s, "
        f"{summary['failed']} failed{_reasons(found['failures'])}",
        f"{_number(summary['request_throughput'])} requests/s, {_number(summary['output_throughput'])} tokens/s",
    ]
    if "request_goodput" in summary:
        lines.append(f"goodput {_number(summary['request_goodput'])} requests/s within {_limits(found['goodput_ms'])}")
    lines.append(f"{'ms':>6}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}")
    for name in ("ttft", "tpot", "itl", "wait", "e2el"):
        values = [summary[f"{key}_{name}_ms"] for key in ("mean", "p50", "p90", "p99")]
        lines.append(f"{name.upper():>6}" + "".join(f"{_number(value):>10}" for value in values))
    if found["emulated_devices"]:
        lines.append(f"EMULATED DEVICES on {len(found['emulated_devices'])} servers")
    if found["dilation"] != 1:
        lines.append(f"times are the wall clock's divided by {found['dilation']:g} (time dilation)")
    if not verdict["accepted"]:
        lines += [f"REJECTED: {reason}" for reason in verdict["reasons"]]
    return "\n".join(lines)


def _emulated(record: RunRecord) -> dict[str, Any]:
    """By peer id, as the clients saw them at the end, or else at the beginning."""
    found = {}
    for facts in (record.facts_before, record.facts_after):
        for known in facts.values():
            for server in known.get("servers", ()):
                if server.get("emulated") is not None:
                    found[server["peer_id"]] = server["emulated"]
    return found


def _dilations(devices: Mapping[str, Any], wan: Mapping[str, Any] | None) -> dict[str, float]:
    found = {f"the device of server {peer[-6:]}": float(device["dilation"]) for peer, device in devices.items()}
    return found | ({"the network": float(wan["dilation"])} if wan is not None else {})


def _without_devices(facts: Facts) -> dict[str, Any]:
    """They stand in `emulated_devices`."""
    return {
        host: {**known, "servers": [{k: v for k, v in s.items() if k != "emulated"} for s in known.get("servers", ())]}
        for host, known in facts.items()
    }


def _describe_load(load: Load) -> dict[str, Any]:
    return {
        "request_rate": {host: rate if math.isfinite(rate) else "inf" for host, rate in load.rates.items()},
        "burstiness": load.burstiness if math.isfinite(load.burstiness) else "inf",
        "num_prompts": load.requests,
        "num_warmups": load.warmups,
    }


def _reasons(failures: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{reason} {count}' for reason, count in failures.items())})" if failures else ""


def _limits(goodput_ms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {limit:g} ms" for name, limit in goodput_ms.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
