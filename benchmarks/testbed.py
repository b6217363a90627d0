"""Is the emulated testbed true: is a token's time that of the links plus the software's, for stock PETALS and for us?

Method. A tiny Llama (6 blocks, hidden size 64, a checkpoint that both stacks read alike) on two servers and one client,
each in a host of its own of an emulated network: client to servers 40 and 100 ms, server to server 60 ms (round trips).
One session at a time, `--requests` of them with 24 tokens each, three seeds. Each system's overhead is measured first
in the same processes' network with all delays 0; the prediction is that TPOT plus

    relay (the client asks each server itself)   40 + 100 ms
    push  (servers hand on)                      20 + 30 + 50 ms

per token. We push, stock PETALS relays (PATHS). Tokens are compared with an unmodified local model's, and between
systems. The network's lateness, the machine's load and the verdict of the rejection rule stand in each run. Needs
root, or user namespaces, and .venv-stock (`make stock`); `--no-stock` leaves PETALS out.

    python benchmarks/testbed.py [--quick] [--no-stock] [--dilation K] [--out FILE]
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from provenance import write_results
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[1]))
from geopetals.bench.lengths import Length
from geopetals.bench.our_server import OurServerSpec, our_swarm
from geopetals.bench.report import result
from geopetals.bench.run import RunRecord, run_load
from geopetals.bench.stock_server import StockServerSpec, stock_swarm
from geopetals.bench.systems import GEOPETALS, STOCK, SystemUnderTest
from geopetals.bench.workload import Load, draw
from geopetals.join_token import JoinToken
from geopetals.wan import HostSpec, LinkSpec, Wan, WanSpec
from tests.interop.checkpoints import NUM_BLOCKS, save

_SWARM, _SPANS, _SERVERS = "tiny-llama", ((0, 3), (3, NUM_BLOCKS)), ("near", "far")
_RTT_S = {("client", "near"): 0.040, ("client", "far"): 0.100, ("near", "far"): 0.060}
PATHS = {GEOPETALS: "push", STOCK: "relay"}
_LINKS_S = {"relay": 0.040 + 0.100, "push": (0.040 + 0.060 + 0.100) / 2}
_OUTPUT_TOKENS, _SEED = 24, 20251221


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two requests")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--no-stock", action="store_true", help="without stock PETALS")
    parser.add_argument("--dilation", type=float, default=1.0, help="all delays this much longer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "testbed.json")
    args = parser.parse_args()
    requests, seeds = (2, 1) if args.quick else (args.requests, 3)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        model = save("llama", Path(folder) / "llama")
        for system in (GEOPETALS,) if args.no_stock else (GEOPETALS, STOCK):
            runs += _system_runs(system, model, requests=requests, seeds=seeds, dilation=args.dilation)
    write_results(args.out, summary=_summary(runs), runs=runs, seed=_SEED)
    return 0 if all(run["right_tokens"] for run in runs) else 1


def _system_runs(system: str, model: Path, *, requests: int, seeds: int, dilation: float) -> list[dict[str, Any]]:
    runs = []
    links = {pair: LinkSpec(rtt_s=0) for a, b in _RTT_S for pair in ((a, b), (b, a))}
    spec = WanSpec(hosts=tuple(HostSpec(name=name) for name in ("client", *_SERVERS)), links=links, dilation=dilation)
    with Wan(spec) as wan, _swarm(system, model, wan) as peers:
        under_test = SystemUnderTest(system=system, model=str(model), initial_peers=peers, swarm=_SWARM)
        for number in range(seeds):
            for delayed in (False, True):
                for (a, b), rtt_s in _RTT_S.items():
                    wan.set(f"{a}-{b}", rtt_s=rtt_s if delayed else 0.0)
                found = _run(under_test, wan, model, requests=requests, seed=_SEED + number, dilation=dilation)
                runs.append({"system": system, "seed": _SEED + number, "delayed": delayed, **found})
                print({key: runs[-1][key] for key in ("system", "delayed", "tpot_ms", "right_tokens")}, flush=True)
    return runs


@contextmanager
def _swarm(system: str, model: Path, wan: Wan) -> Iterator[tuple[str, ...]]:
    hosts = [(span, wan.addresses[host], tuple(wan.prefix(host))) for span, host in zip(_SPANS, _SERVERS, strict=True)]
    if system == STOCK:
        stock = [StockServerSpec(span=span, address=address, prefix=prefix) for span, address, prefix in hosts]
        with stock_swarm(model, stock, swarm=_SWARM) as swarm:
            yield swarm.peers
    else:
        ours = [OurServerSpec(span=span, address=address, prefix=prefix) for span, address, prefix in hosts]
        with our_swarm(model, ours, swarm=_SWARM) as token:
            yield JoinToken.decode(token).peers


def _run(
    under_test: SystemUnderTest, wan: Wan, model: Path, *, requests: int, seed: int, dilation: float
) -> dict[str, Any]:
    length = Length(low=16, high=16)
    load = Load(
        rates={"client": 1 / 6.0},  # nobody waits for another: a session takes 4 s
        requests=requests,
        prompt_tokens=length,
        output_tokens=Length(low=_OUTPUT_TOKENS, high=_OUTPUT_TOKENS),
        burstiness=float("inf"),
        warmups=1,
    )
    statuses: list[dict[str, Any]] = []
    record = run_load(
        [under_test.worker("client", wan.prefix("client"))],
        lambda vocabulary: draw(load, vocabulary=vocabulary, seed=seed),
        dilation=dilation,
        before=wan.reset,
        after=lambda: statuses.append(wan.status()),
    )
    found = result(
        record,
        system=under_test,
        load=load,
        command="",
        seed=seed,
        dilation=dilation,
        goodput_ms={},
        details=False,
        wan=statuses[0],
    )
    return {
        "tpot_ms": found["summary"]["median_tpot_ms"],
        "p99_itl_ms": found["summary"]["p99_itl_ms"],
        "completed": found["summary"]["completed"],
        "right_tokens": _right(record, _local_model(model)),
        "tokens_sha256": found["tokens_sha256"],
        "verdict": found["verdict"],
        "lateness": statuses[0]["run"]["lateness"],
        "believed": found["clients"]["after"],
    }


def _local_model(model: Path) -> Callable[[tuple[int, ...]], list[int]]:
    local: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def answer(prompt: tuple[int, ...]) -> list[int]:
        inputs = torch.tensor([prompt])
        options = {"min_new_tokens": _OUTPUT_TOKENS, "max_new_tokens": _OUTPUT_TOKENS, "pad_token_id": 0}
        output = local.generate(inputs, do_sample=False, **options)
        return list(output[0, inputs.shape[1] :].tolist())

    return answer


def _right(record: RunRecord, local: Callable[[tuple[int, ...]], list[int]]) -> bool:
    return all(list(outcome.tokens) == local(outcome.request.prompt) for outcome in record.outcomes)


def _summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for system in dict.fromkeys(run["system"] for run in runs):
        here = [run for run in runs if run["system"] == system]
        overhead_ms, measured_ms = (
            statistics.median(run["tpot_ms"] for run in here if run["delayed"] == delayed) for delayed in (False, True)
        )
        predicted_ms = overhead_ms + 1000 * _LINKS_S[PATHS[system]]
        summary |= {
            f"{system}_overhead_ms_per_hop": overhead_ms / len(_SERVERS),
            f"{system}_tpot_ms": measured_ms,
            f"{system}_predicted_tpot_ms": predicted_ms,
            f"{system}_error_percent": 100 * (measured_ms / predicted_ms - 1),
            f"{system}_right_tokens": float(all(run["right_tokens"] for run in here)),
            f"{system}_accepted_runs": sum(run["verdict"]["accepted"] for run in here if run["delayed"]),
            f"{system}_runs": len(here) / 2,
        }
    return summary


if __name__ == "__main__":
    sys.exit(main())
