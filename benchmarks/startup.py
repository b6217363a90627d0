"""How soon is a block server ready, and how much memory does it take: a process of its own against a preloaded fork?

Method. The model of the demo (SmolLM2-135M-Instruct, 30 blocks, float32), ten blocks per server, on the CPU. In each
round three servers are started one after another in both ways, the two ways in turn:
  fresh      `geopetals serve` as a new Python process; time from its start until it prints that it serves
  preloaded  a fork of the process that `geopetals up` keeps; time from the request until it serves (the time that the
             preloaded process itself takes to import everything is given apart, as preload_s)
Memory is the proportional set size (PSS: shared pages are divided among their users) of the server and its p2pd
together, when all three servers of that way run. Linux only, where /proc tells the PSS. The file cache is warm: the
model is read once before the first round.

    python benchmarks/startup.py [--quick] [--out FILE]
"""

import argparse
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from provenance import percentiles, write_results

from geopetals.progress import Console
from geopetals.swarm.local import LocalSwarm, even_spans
from geopetals.swarm.smollm2 import demo_model_directory

_SERVERS = 3
_DEADLINE_S = 180.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one round instead of three")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    args = parser.parse_args()
    model = str(demo_model_directory(Console()))
    spans = even_spans(30, _SERVERS)
    for shard in Path(model).glob("*.safetensors"):
        shard.read_bytes()
    runs = []
    for number in range(1 if args.quick else 3):
        for way, measure in (("fresh", _fresh), ("preloaded", _preloaded)):
            for run in measure(model, spans):
                runs.append({"round": number, "way": way, **run})
                print(runs[-1], flush=True)
    write_results(args.out, summary=_summary(runs), runs=runs, seed=None)
    return 0


def _fresh(model: str, spans: list[tuple[int, int]]) -> list[dict[str, Any]]:
    runs, servers = [], []
    with ExitStack() as held:
        token = None
        for start, end in spans:
            command = [sys.executable, "-m", "geopetals", "serve", model, "--blocks", f"{start}:{end}"]
            began = time.monotonic()
            server = subprocess.Popen(
                command + (["--join", token] if token else []),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            held.callback(_end, server)
            token = _token_when_ready(server)
            runs.append({"ready_s": time.monotonic() - began})
            servers.append(server.pid)
        for run, pid in zip(runs, servers, strict=True):
            run["pss_mb"] = _pss_mb(pid)
    return runs


def _preloaded(model: str, spans: list[tuple[int, int]]) -> list[dict[str, Any]]:
    began = time.monotonic()
    with LocalSwarm(model) as swarm:
        swarm.start(spans=spans[:1])
        preload_s = swarm.preload_s
        first_s = time.monotonic() - began
        for span in spans[1:]:
            swarm.add(span)
        return [
            {"ready_s": server.ready_s, "pss_mb": _pss_mb(server.pid), "preload_s": preload_s, "first_ready_s": first_s}
            if server.number == 0
            else {"ready_s": server.ready_s, "pss_mb": _pss_mb(server.pid)}
            for server in swarm.servers
        ]


def _token_when_ready(server: "subprocess.Popen[str]") -> str:
    deadline = time.monotonic() + _DEADLINE_S
    assert server.stdout is not None
    for line in server.stdout:
        if " --join " in line:
            return line.split(" --join ")[1].split()[0]
        if time.monotonic() > deadline:
            break
    raise SystemExit("a server did not become ready")


def _end(server: "subprocess.Popen[str]") -> None:
    server.terminate()
    server.communicate(timeout=30)


def _pss_mb(pid: int) -> float:
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_full_info().pss for member in family) / 1e6


def _summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for way in ("fresh", "preloaded"):
        for figure in ("ready_s", "pss_mb", "preload_s"):
            values = [run[figure] for run in runs if run["way"] == way and figure in run]
            if values:
                summary |= percentiles(f"{way}_{figure}", values)
    summary["fresh_to_preloaded_ready_ratio"] = summary["fresh_ready_s_p50"] / summary["preloaded_ready_s_p50"]
    summary["fresh_to_preloaded_pss_ratio"] = summary["fresh_pss_mb_p50"] / summary["preloaded_pss_mb_p50"]
    return summary


if __name__ == "__main__":
    sys.exit(main())
