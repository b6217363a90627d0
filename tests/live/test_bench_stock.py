"""Stock PETALS on the emulated testbed: its own placement and routing, the same tokens, delays and devices felt."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from geopetals.bench.lengths import Length
from geopetals.bench.stock_server import StockServerSpec, StockSwarm, stock_swarm
from geopetals.bench.systems import STOCK_PYTHON
from geopetals.bench.workload import Load, draw
from geopetals.swarm.emulation import DeviceSpec
from geopetals.wan import Wan, WanError, WanSpec
from tests.interop.checkpoints import NUM_BLOCKS, save
from tests.live import commands
from tests.models import VOCABULARY

if not STOCK_PYTHON.exists():
    pytest.skip("no stock PETALS here: run `make stock`", allow_module_level=True)

pytestmark = [pytest.mark.live, pytest.mark.timeout(400)]

SWARM, REQUESTS = "tiny-llama", 3
LOAD = ("--num-prompts", str(REQUESTS), "--request-rate", "2", "--input-len", "8", "--output-len", "6", "--no-reject")
# By PETALS' own rule: 9.6 MB of work space at hidden size 64, and blocks of 4.4 MB with its default cache: four fit.
DEVICE = DeviceSpec(weights_s=0.008, session_s=0.002, fixed_s=0.004, token_s=0.0005, memory_bytes=27_500_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


def expected(model: Path) -> list[list[int]]:
    """What an unmodified local model, of transformers 5, answers to LOAD."""
    local: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lengths = {"prompt_tokens": Length(low=8, high=8), "output_tokens": Length(low=6, high=6)}
    asked = draw(Load(rates={"a": 2.0}, requests=REQUESTS, warmups=1, **lengths), vocabulary=VOCABULARY, seed=0)
    options = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompts = [list(request.prompt) for request in asked if request.arrival_s is not None]
    return [local.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]


def bench(model: Path, swarm: StockSwarm, *arguments: str | Path) -> dict[str, Any]:
    where = ("--system", "stock", "--initial-peers", *swarm.peers, "--dht-prefix", SWARM, "--model", model)
    ended = commands.run("bench", *where, *LOAD, *arguments, "--json", "--details", timeout_s=200)
    assert ended.process.returncode == 0, ended.printed()
    found: dict[str, Any] = json.loads(ended.out.text)
    assert found["failures"] == {}
    assert [request["tokens"] for request in found["requests"]] == expected(model)
    return found


def test_stock_places_itself_on_emulated_devices(model: Path) -> None:
    server = StockServerSpec(device=DEVICE, network_bit_per_s=8e6)
    with stock_swarm(model, [server, server], swarm=SWARM) as swarm:
        found = bench(model, swarm)
        beliefs = swarm.beliefs()
    assert [(belief["start_block"], belief["end_block"]) for belief in beliefs] == [(0, 4), (2, 6)]
    for belief in beliefs:
        assert belief["inference_rps"] <= 1.02 / 0.010
        assert belief["forward_rps"] <= 1.02 / 0.0005
        assert belief["network_rps"] == 8e6 / (64 * 16)
        assert belief["throughput"] == min(belief["forward_rps"] / 2.5, belief["network_rps"])
    assert found["summary"]["mean_tpot_ms"] >= 0.98 * NUM_BLOCKS * (8 + 2)
    assert set(found["emulated_devices"]) == {belief["peer_id"] for belief in beliefs}


@pytest.fixture
def wan() -> Iterator[Wan]:
    with contextlib.ExitStack() as held:
        try:
            started = held.enter_context(Wan(WanSpec.uniform(["client", "near", "far"], rtt_s=0.06)))
        except WanError as error:
            pytest.skip(str(error))
        yield started


def test_stock_relays_over_the_emulated_network(model: Path, wan: Wan) -> None:
    """40 and 100 ms to the servers: each token takes both round trips."""
    wan.set("client-near", rtt_s=0.04)
    wan.set("client-far", rtt_s=0.10)
    servers = [
        StockServerSpec(span=span, address=wan.addresses[host], prefix=tuple(wan.prefix(host)))
        for host, span in (("near", (0, 3)), ("far", (3, NUM_BLOCKS)))
    ]
    with stock_swarm(model, servers, swarm=SWARM) as swarm:
        found = bench(model, swarm, "--host", "client", "--wan", wan.directory.path)
    assert 140 <= found["summary"]["median_tpot_ms"] < 1000
    rtts_s = found["clients"]["after"]["client"]["rtt_s"]
    assert all(rtt_s >= 0.04 for rtt_s in rtts_s.values())
