"""`geopetals bench` before it reaches a swarm: what it asks for, and what it refuses."""

import argparse
import math
from pathlib import Path

import pytest

from geopetals.cli import bench, build_parser, logs, main

PEER = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWAkxmPQg8FgoTvy7Wi2hWbjBJYuFBQ1q2JX7oxEkXb4jD"
SWARM = ["bench", "--initial-peers", PEER, "--model", "some/model"]


@pytest.fixture(autouse=True)
def environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "configure", lambda args: None)


def parse(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args([*SWARM, *arguments])


def test_hosts_share_the_rate_that_they_do_not_have_themselves() -> None:
    load = bench._load(parse("--host", "paris=0.5", "--host", "tokyo", "--host", "são paulo", "--request-rate", "3"))
    assert load.rates == {"paris": 0.5, "tokyo": 1.0, "são paulo": 1.0}


def test_without_a_rate_all_requests_come_at_once_from_here() -> None:
    assert bench._load(parse()).rates == {"local": math.inf}


def test_clients_start_by_the_command_of_their_host() -> None:
    assert bench._prefix(parse("--exec", "ssh -q {host}.example 'nice'"), "a") == ["ssh", "-q", "a.example", "nice"]
    assert bench._prefix(parse("--wan", "w"), "a")[-6:] == ["wan", "exec", "--name", "w", "a", "--"]
    assert bench._prefix(parse("--wan", "/run/w"), "a")[-6:] == ["wan", "exec", "--state", "/run/w", "a", "--"]
    assert bench._prefix(parse(), "a") == []


@pytest.mark.parametrize("join", [["--join", "gp1secret"], ["--join=gp1secret"]])
def test_the_result_does_not_hold_the_token(join: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["geopetals", "bench", *join, "--seed", "3"])
    args = build_parser().parse_args(["bench", *join, "--seed", "3"])
    assert "secret" not in bench._command(args)
    assert bench._command(args).endswith("TOKEN --seed 3")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input-len", "many"], "no length"),
        (["--request-rate", "0"], "no rate"),
        (["--host", "a=fast"], "no rate"),
        (["--host", "a", "--host", "a"], "one name"),
        (["--burstiness", "0"], "burstiness"),
        (["--goodput", "ttft"], "service level"),
        (["--trace", "/nowhere.csv"], "cannot be read"),
        (["--dilation", "0"], "--dilation"),
        (["--dilation", "nan"], "--dilation"),
        (["--system", "stock", "--stock-python", "/nowhere/python"], "make stock"),
        (["--wan", "w", "--exec", "ssh {host}"], "--exec"),
        (["--num-prompts", "0"], "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SWARM, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_swarm_without_a_token_needs_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--initial-peers", PEER]) == 2
    assert "--model" in capsys.readouterr().err


def test_serve_takes_a_device_from_a_cluster_file() -> None:
    from geopetals.cli.serve import emulated_device

    cluster = Path(__file__).parents[2] / "examples" / "clusters" / "home-gpus.yaml"
    spec = emulated_device(
        build_parser().parse_args(["serve", "m", "--emulate", f"{cluster}:tokyo", "--dilation", "2"])
    )
    assert spec is not None
    assert (spec.memory_bytes, spec.dilation) == (22 * 10**9, 2.0)
    assert emulated_device(build_parser().parse_args(["serve", "m"])) is None
