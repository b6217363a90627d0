"""Do clients see the times of the emulated device, also when several sessions share it?

Method. A tiny Llama (6 blocks) on one server on loopback, on a device that takes 4 ms + 1 ms per session and block to
decode, and 2 ms + 0.2 ms per token and block to prefill. 1, 2 and 4 sessions start at once and make 48 tokens each from
64. Measured is the mean time between tokens while all of them decode: from the first token of the last session, so that
no prefill of another is in it, to the last token of the first (`steady_itl_ms`). The overhead of software is measured
first, in the same run, for each number of sessions, on a device 2.5 times as fast (slower still than the real
computing): what is measured there less that device's time. All sessions are threads of one client process, which
works for one after another: overhead(n) grows with n. Predicted, per token:

    one session                             S + overhead(1)               S = 6 * (4 ms + 1 ms)
    n sessions that are computed one by one n * S to n * S + overhead(1)
    n sessions that are computed together   B + overhead(n)               B = 6 * (4 ms + n * 1 ms)

as software's work for one session is hidden behind the device's for another where they are computed one by one; and for
the first token of one session 6 * (2 ms + 64 * 0.2 ms) + the overhead of a prompt, measured in the same way and
counted from when its cache is reserved. `off_percent` is what lies outside.
We compute sessions together, stock PETALS does not (BATCHES). Three rounds, stock PETALS beside us in each; its own
profiler should believe 200 tokens/s per block (`stock_believed_inference_rps`).

    python benchmarks/device_emulation.py [--quick] [--no-stock] [--dilation K] [--out FILE]
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from provenance import write_results

sys.path.append(str(Path(__file__).parents[1]))
from geopetals.bench.lengths import Length
from geopetals.bench.our_server import OurServerSpec, our_swarm
from geopetals.bench.report import result
from geopetals.bench.run import RunRecord, run_load
from geopetals.bench.stock_server import StockServerSpec, stock_swarm
from geopetals.bench.systems import GEOPETALS, STOCK, SystemUnderTest
from geopetals.bench.workload import Load, draw
from geopetals.join_token import JoinToken
from geopetals.swarm.emulation import DeviceSpec
from tests.interop.checkpoints import NUM_BLOCKS, save

BATCHES = {GEOPETALS: True, STOCK: False}
_SWARM, _SESSIONS, _PROMPT, _OUTPUT, _SEED = "tiny-llama", (1, 2, 4), 64, 48, 20251221
_FIGURES_S = {"weights_s": 0.004, "session_s": 0.001, "fixed_s": 0.002, "token_s": 0.0002}
_SLOW, _FAST = DeviceSpec(**_FIGURES_S), DeviceSpec(**{name: value / 2.5 for name, value in _FIGURES_S.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--no-stock", action="store_true", help="without stock PETALS")
    parser.add_argument("--dilation", type=float, default=1.0, help="the device is this much slower")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "device_emulation.json")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        model = save("llama", Path(folder) / "llama")
        for number in range(1 if args.quick else 3):
            for system in (GEOPETALS,) if args.no_stock else (GEOPETALS, STOCK):
                for device in (_FAST, _SLOW):
                    dilated = replace(device, dilation=args.dilation)
                    runs += [{"round": number, "slow": device is _SLOW, **run} for run in _runs(system, model, dilated)]
    write_results(args.out, summary=_summary(runs), runs=runs, seed=_SEED)
    return 0


def _runs(system: str, model: Path, device: DeviceSpec) -> Iterator[dict[str, Any]]:
    with _server(system, model, device) as peers:
        under_test = SystemUnderTest(system=system, model=str(model), initial_peers=peers, swarm=_SWARM)
        for sessions in _SESSIONS if BATCHES[system] or device.weights_s == _SLOW.weights_s else (1,):
            run = _run(under_test, sessions, device.dilation)
            yield {"system": system, "sessions": sessions, **run}
            print({"system": system, "sessions": sessions, "steady_itl_ms": run["steady_itl_ms"]}, flush=True)


@contextmanager
def _server(system: str, model: Path, device: DeviceSpec) -> Iterator[tuple[str, ...]]:
    span = (0, NUM_BLOCKS)
    if system == STOCK:
        with stock_swarm(model, [StockServerSpec(span=span, device=device)], swarm=_SWARM) as swarm:
            yield swarm.peers
    else:
        with our_swarm(model, [OurServerSpec(span=span, device=device)], swarm=_SWARM) as token:
            yield JoinToken.decode(token).peers


def _run(under_test: SystemUnderTest, sessions: int, dilation: float) -> dict[str, Any]:
    load = Load(
        rates={"local": float("inf")},
        requests=sessions,
        prompt_tokens=Length(low=_PROMPT, high=_PROMPT),
        output_tokens=Length(low=_OUTPUT, high=_OUTPUT),
        warmups=1,
    )
    record = run_load(
        [under_test.worker("local")],
        lambda vocabulary: draw(load, vocabulary=vocabulary, seed=_SEED),
        dilation=dilation,
    )
    found = result(
        record,
        system=under_test,
        load=load,
        command="",
        seed=_SEED,
        dilation=dilation,
        goodput_ms={},
        details=False,
        wan=None,
    )
    summary, known = found["summary"], found["clients"]["after"]["local"]["servers"][0]
    return {
        "steady_itl_ms": 1000 * _steady_itl_s(record) / dilation,
        "tpot_ms": summary["mean_tpot_ms"],
        "p99_itl_ms": summary["p99_itl_ms"],
        "prefill_ms": summary["mean_ttft_ms"] - summary["mean_wait_ms"],
        "completed": summary["completed"],
        "inference_rps": known["inference_rps"],
        "tokens_sha256": found["tokens_sha256"],
        "verdict": found["verdict"],
        "devices": found["emulated_devices"],
    }


def _steady_itl_s(record: RunRecord) -> float:
    """Mean time between a session's tokens while all decode; all were due at the same moment."""
    times = [outcome.token_s for outcome in record.outcomes]
    began, ended = max(own[0] for own in times), min(own[-1] for own in times)
    within = [[moment for moment in own if began <= moment <= ended] for own in times]
    return sum(own[-1] - own[0] for own in within) / sum(len(own) - 1 for own in within)


def _summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for system in dict.fromkeys(run["system"] for run in runs):
        here = [run for run in runs if run["system"] == system]
        for sessions in _SESSIONS:
            overhead_ms = _overhead_ms(here, sessions if BATCHES[system] else 1)
            measured_ms = _steady_ms(here, sessions, slow=True)
            device_ms = 1000 * _step_s(_SLOW, system, sessions)
            hidden = sessions > 1 and not BATCHES[system]
            predicted_ms = (device_ms if hidden else device_ms + overhead_ms, device_ms + overhead_ms)
            summary[f"{system}_overhead_ms_{sessions}_sessions"] = overhead_ms
            summary[f"{system}_itl_ms_{sessions}_sessions"] = measured_ms
            summary[f"{system}_predicted_ms_{sessions}_sessions"] = predicted_ms[1]
            summary[f"{system}_off_percent_{sessions}_sessions"] = _off_percent(measured_ms, *predicted_ms)
        summary[f"{system}_prefill_overhead_ms"] = overhead_ms = _prefill_ms(here, slow=False) - _prompt_ms(_FAST)
        measured_ms, prefill_ms = _prefill_ms(here, slow=True), _prompt_ms(_SLOW) + overhead_ms
        summary[f"{system}_prefill_off_percent"] = _off_percent(measured_ms, prefill_ms, prefill_ms)
        summary[f"{system}_believed_inference_rps"] = statistics.median(
            run["inference_rps"] for run in here if run["slow"] and run["sessions"] == 1
        )
        summary[f"{system}_accepted_runs"] = sum(run["verdict"]["accepted"] for run in here)
        summary[f"{system}_runs"] = len(here)
    return summary


def _prefill_ms(runs: list[dict[str, Any]], *, slow: bool) -> float:
    return statistics.median(run["prefill_ms"] for run in runs if run["slow"] == slow and run["sessions"] == 1)


def _prompt_ms(device: DeviceSpec) -> float:
    return 1000 * device.prefill_s(blocks=NUM_BLOCKS, tokens=_PROMPT)


def _steady_ms(runs: list[dict[str, Any]], sessions: int, *, slow: bool) -> float:
    return statistics.median(
        run["steady_itl_ms"] for run in runs if run["slow"] == slow and run["sessions"] == sessions
    )


def _overhead_ms(runs: list[dict[str, Any]], sessions: int) -> float:
    """Of one system; that which computes sessions one by one has one session on the fast device."""
    system = runs[0]["system"]
    return _steady_ms(runs, sessions, slow=False) - 1000 * _step_s(_FAST, system, sessions)


def _off_percent(measured: float, low: float, high: float) -> float:
    """0 from low to high, else how far outside."""
    nearest = min(max(measured, low), high)
    return 100 * (measured / nearest - 1)


def _step_s(device: DeviceSpec, system: str, sessions: int) -> float:
    if BATCHES[system]:
        return device.decode_s(blocks=NUM_BLOCKS, sessions=sessions)
    return sessions * device.decode_s(blocks=NUM_BLOCKS, sessions=1)


if __name__ == "__main__":
    sys.exit(main())
