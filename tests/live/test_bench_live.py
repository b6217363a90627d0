"""benchmarks/bench_live.py on three small servers: its files, the same tokens of all systems, hashed predictions."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from geopetals.bench.systems import STOCK_PYTHON
from geopetals.wan import Wan, WanError, WanSpec

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
SCENARIO = """
name: smoke
cluster:
  model: {name: small, blocks: 6, hidden_size: 512, block_memory: 40 MB, kv_per_token: 4096 B, hidden_state: 1024 B}
  workload: {prompt_tokens: 20, output_tokens: 44, arrivals: 6/min}
  servers:
    - {name: near, memory: 900 MB, max_blocks: 3, decode_block: 8 ms, prefill_block: 10 ms}
    - {name: far, memory: 900 MB, max_blocks: 4, decode_block: {weights: 4 ms, per_session: 1 ms}, prefill_block: 5 ms}
    - {name: farther, memory: 900 MB, max_blocks: 4, decode_block: 6 ms, prefill_block: 8 ms}
  clients:
    - {name: people, place: near}
  network:
    rtt: {near: {near: 4 ms, far: 40 ms, farther: 60 ms}, far: {farther: 30 ms}}
prompt_tokens: 8
output_tokens: 8
sessions: {one: 2, half: 3}
orders: 1
targets: {one: 0.5}
"""
# What software takes is measured on a network of its own in a real run, which has no place in a test.
SOFTWARE = {"hop_s": 0.002, "open_s": 0.01, "open_rtts": 1.0}


@pytest.fixture
def emulated() -> None:
    try:
        with Wan(WanSpec.uniform(["a", "b"], rtt_s=0.0)):
            pass
    except WanError as error:
        pytest.skip(str(error))


def bench(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return ended.stdout


@pytest.mark.usefixtures("emulated")
def test_systems_are_compared_and_predicted(tmp_path: Path) -> None:
    systems = ["geopetals", "paper"] + (["stock"] if STOCK_PYTHON.exists() else [])
    scenario, out = tmp_path / "smoke.yaml", tmp_path / "out"
    scenario.write_text(SCENARIO)
    out.mkdir()
    setup = {f"software_{kind}": SOFTWARE for kind in ("own", "stock")}
    (out / "smoke.json").write_text(json.dumps({"setup": setup, "runs": []}))
    loads = "one,half" if len(systems) == 2 else "one"
    table = bench("bench_live.py", scenario, "--out", out, "--resume", "--loads", loads, "--systems", ",".join(systems))
    found: dict[str, Any] = json.loads((out / "smoke.json").read_text())
    runs = found["runs"]
    assert {(run["system"], run["load"]) for run in runs} == {(s, load) for s in systems for load in loads.split(",")}
    assert [run.get("failed") for run in runs] == [None] * len(runs)
    assert all(run["right_tokens"] and not run["failures"] for run in runs)
    for load in loads.split(","):
        assert len({run["tokens_sha256"] for run in runs if run["load"] == load}) == 1
    assert found["setup"]["diverging_rate_per_s"] > 0
    assert all(f"| {system} |" in table for system in systems)
    assert (out / "smoke.md").read_text().strip() == table.strip()
    bench("bench_fidelity.py", "smoke", "--results", out)
    compared = json.loads((out / "smoke.fidelity.json").read_text())
    assert [run["prediction_sha256"] for run in compared["runs"]] == [run["prediction_sha256"] for run in runs]
