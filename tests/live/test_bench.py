"""`geopetals bench` on swarms of ours: the right tokens, figures that are there, devices and delays that are felt."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.bench.devices import device_text
from geopetals.bench.our_server import OurServerSpec, our_swarm
from geopetals.swarm.emulation import DeviceSpec
from geopetals.swarm.local import LocalSwarm
from geopetals.wan import Wan, WanError, WanSpec
from tests.live import commands
from tests.live.conftest import StartCommand
from tests.models import VOCABULARY

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

LOAD = ("--num-prompts", "4", "--request-rate", "4", "--input-len", "8", "--output-len", "6", "--no-reject")
DEVICE = DeviceSpec(weights_s=0.008, session_s=0.002, fixed_s=0.004, token_s=0.0005, dilation=2.0)


def bench(*arguments: str | Path) -> dict[str, Any]:
    ended = commands.run("bench", *arguments, "--json", "--details", timeout_s=150)
    assert ended.process.returncode == 0, ended.printed()
    found: dict[str, Any] = json.loads(ended.out.text)
    assert found["failures"] == {}
    return found


def tokens_of(local: Any, prompt: list[int], count: int) -> list[int]:
    inputs = torch.tensor([prompt])
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    output: list[int] = local.generate(inputs, **options)[0, len(prompt) :].tolist()
    return output


def expected(local: Any, *, seed: int = 0, requests: int = 4) -> list[list[int]]:
    """What an unmodified local model answers to LOAD."""
    from geopetals.bench.lengths import Length
    from geopetals.bench.workload import Load, draw

    lengths = {"prompt_tokens": Length(low=8, high=8), "output_tokens": Length(low=6, high=6)}
    load = Load(rates={"local": 4.0}, requests=requests, warmups=1, **lengths)
    asked = draw(load, vocabulary=VOCABULARY, seed=seed)
    return [tokens_of(local, list(request.prompt), 6) for request in asked if request.arrival_s is not None]


def test_a_run_gives_the_tokens_of_the_local_model(two_stages: LocalSwarm, local: Any, tmp_path: Path) -> None:
    file = tmp_path / "folder" / "run.json"
    found = bench("--join", two_stages.token, *LOAD, "--goodput", "ttft:60000", "tpot:60000", "--out", file)
    assert [request["tokens"] for request in found["requests"]] == expected(local)
    summary = found["summary"]
    assert (summary["completed"], summary["failed"]) == (4, 0)
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (32, 24)
    assert summary["good_share"] == 1
    assert 0 < summary["mean_wait_ms"] < summary["mean_ttft_ms"] < summary["mean_e2el_ms"]
    assert 0 < summary["p50_itl_ms"] <= summary["p90_itl_ms"] <= summary["p99_itl_ms"]
    assert found["emulated_devices"] == {}
    assert found["provenance"]["seed"] == 0
    assert two_stages.token not in file.read_text()
    assert json.loads(file.read_text())["summary"] == summary
    chains = {tuple(map(tuple, request["chain"])) for request in found["requests"]}
    assert [span[1:] for span in next(iter(chains))] == [(0, 3), (3, 6)]


def test_several_hosts_ask_at_once(two_stages: LocalSwarm) -> None:
    found = bench("--join", two_stages.token, *LOAD, "--host", "a=3", "--host", "b=3", "--exec", "env HOST_NAME={host}")
    assert {request["host"] for request in found["requests"]} == {"a", "b"}
    assert set(found["clients"]["after"]) == {"a", "b"}


@pytest.fixture(scope="module")
def emulated(llama: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(str(llama), emulate=DEVICE.to_dict()) as swarm:
        yield swarm.start(spans=[(0, 3), (3, 6)])


def test_emulated_devices_are_felt_and_marked(emulated: LocalSwarm, local: Any) -> None:
    found = bench("--join", emulated.token, *LOAD, "--dilation", "2")
    assert [request["tokens"] for request in found["requests"]] == expected(local)
    assert set(found["emulated_devices"]) == {server.peer_id for server in emulated.servers}
    assert {device["dilation"] for device in found["emulated_devices"].values()} == {2.0}
    assert found["dilation"] == 2.0
    # Nothing is faster than the devices, in times that are not dilated; a late step is made up for by the next one.
    assert found["summary"]["mean_tpot_ms"] >= 0.98 * 6 * (8 + 2)
    assert found["summary"]["mean_ttft_ms"] - found["summary"]["mean_wait_ms"] >= 0.98 * 6 * (4 + 8 * 0.5)
    for server in found["clients"]["before"]["local"]["servers"]:
        assert server["inference_rps"] <= 1.02 / (2 * 0.010)  # its own profiler sees the device, too


def test_another_dilation_than_the_devices_is_rejected(emulated: LocalSwarm) -> None:
    ended = commands.run("bench", "--join", emulated.token, *LOAD[:-1], timeout_s=150)
    assert ended.process.returncode == 1, ended.printed()
    assert "is dilated 2 times, the run 1 times" in ended.out.text


def test_a_server_says_that_its_device_is_emulated(llama: Path, start_command: StartCommand) -> None:
    server = start_command("serve", llama, "--blocks", "0:1", "--emulate", device_text(DEVICE), "--dilation", "2")
    server.wait_line(r"^EMULATED DEVICE, for benchmarks only: a block takes 16 ms \+ 4 ms per session")


@pytest.fixture
def wan() -> Iterator[Wan]:
    with contextlib.ExitStack() as held:
        try:
            started = held.enter_context(Wan(WanSpec.uniform(["client", "near", "far"], rtt_s=0.06)))
        except WanError as error:
            pytest.skip(str(error))
        yield started


def test_delays_of_an_emulated_network_are_felt(llama: Path, local: Any, wan: Wan) -> None:
    """40 and 100 ms to the servers: a token takes at least the ring of 20 + 30 + 50 ms, by relay 140 ms."""
    wan.set("client-near", rtt_s=0.04)
    wan.set("client-far", rtt_s=0.10)
    servers = [
        OurServerSpec(span=span, address=wan.addresses[host], prefix=tuple(wan.prefix(host)))
        for host, span in (("near", (0, 3)), ("far", (3, 6)))
    ]
    with our_swarm(llama, servers, swarm="tiny") as token:
        found = bench("--join", token, *LOAD, "--host", "client", "--wan", wan.directory.path)
    assert [request["tokens"] for request in found["requests"]] == expected(local)
    assert 100 <= found["summary"]["median_tpot_ms"] < 1000
    assert found["wan"]["run"]["lateness"]["packets"] > 0
    assert found["verdict"]["late_p99_ms"].keys() == {"arrivals", "packets"}
