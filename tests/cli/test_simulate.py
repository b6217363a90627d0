import json
import subprocess
import sys
from pathlib import Path

import pytest

from geopetals import cli
from geopetals.cli import logs, simulate
from geopetals.simulation import scenario

ROOT = Path(__file__).parents[2]
TEXT = f"""
name: short
cluster: {ROOT}/examples/clusters/campus.yaml
workload: {{arrivals: {{rate: 2/min}}, sessions: 20}}
"""


@pytest.fixture(autouse=True)
def environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "configure", lambda args: None)


@pytest.fixture
def short(tmp_path: Path) -> str:
    file = tmp_path / "short.yaml"
    file.write_text(TEXT)
    return str(file)


def test_it_prints_a_row_for_each_policy(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", short, "--compare", "petals,paper", "--seeds", "2"]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].startswith("short: 20 sessions (poisson), means over 2 seeds")
    assert [line.split()[0] for line in lines[2:5]] == ["policy", "petals", "paper"]
    assert output.err == "simulated petals, paper\n"


def test_json_is_one_object(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", short, "--policy", "paper", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    figures = report["policies"][0]["figures"]
    assert report["seeds"] == [0]
    assert 0.1 < figures["tpot_p50_s"] < 10
    assert figures["completed"] == 18


def test_it_draws_the_comparison(short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figure.svg"
    assert cli.main(["simulate", short, "--policy", "paper", "--plot", str(file)]) == 0
    assert file.read_bytes()[:5] == b"<?xml"
    assert capsys.readouterr().out


@pytest.mark.parametrize("options", [["--compare", "petals,peper"], ["--compare", "paper,paper"], ["--seeds", "0"]])
def test_bad_options_are_refused(short: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", short, *options]) == 2
    assert capsys.readouterr().out == ""


def test_the_command_offers_what_there_is() -> None:
    assert simulate.POLICIES == scenario.POLICIES


def test_simulating_loads_nothing_that_the_swarm_needs(short: str) -> None:
    code = (
        f"import sys; from geopetals.cli import main; main(['simulate', {short!r}, '--policy', 'paper']); "
        "print(*({'torch', 'transformers', 'hivemind', 'petals', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
