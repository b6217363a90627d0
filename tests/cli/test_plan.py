import json
import subprocess
import sys
from pathlib import Path

import pytest

from geopetals import cli
from geopetals.cli import logs
from geopetals.cli.plan import METHODS, OBJECTIVES
from geopetals.planning import methods

ROOT = Path(__file__).parents[2]
CAMPUS = str(ROOT / "examples/clusters/campus.yaml")


@pytest.fixture(autouse=True)
def environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands quieten other libraries by way of the environment, which later tests would inherit."""
    monkeypatch.setattr(logs, "configure", lambda args: None)


def test_it_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", CAMPUS]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    assert lines[0].startswith("seven slices and two A100s: bloom-176b, 70 blocks of 1.3 GB")
    row = next(line for line in lines if line.startswith("a100-1"))
    assert row.split()[1:7] == ["0:48", "63.5", "GB", "15.6", "GB", "38"]
    assert any(line.startswith("students  a100-1 0:48 > a100-2 48:70") for line in lines)
    assert "PETALS' rule, 20 random orders of joining: a session alone has a TPOT of" in output.out


def test_json_is_one_object_in_seconds_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", CAMPUS, "--json", "--objective", "push"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["objective"] == "push"
    last = report["servers"][-1]
    assert last["weight_bytes"] == (last["blocks"]["end"] - last["blocks"]["start"]) * 1323397667
    assert 0.2 < report["clients"][0]["alone"]["tpot_s"] < 0.5


def test_the_gap_and_the_service_level_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--bound", "--seed", "4", "--slo-ttft", "5", "--slo-tpot", "0.5", "--percentile", "95"]
    assert cli.main(["plan", CAMPUS, *options]) == 0
    output = capsys.readouterr().out
    assert "All at once, a session takes 61.24 s in the mean, with CG-BP 61.24 s" in output
    assert "the gap is 0.0% at most" in output
    assert "Service level: p95 within TTFT 5.00 s and TPOT 500 ms up to " in output
    assert cli.main(["plan", CAMPUS, "--json", "--slo-tpot", "0.01"]) == 0
    assert json.loads(capsys.readouterr().out)["service_level"]["rate_per_s"] is None


@pytest.mark.parametrize("method", ["cg_bp", "petals", "gsa"])
def test_a_bound_that_would_not_be_printed_is_not_looked_for(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", CAMPUS, "--bound", "--method", method]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "use --method search or exact" in output.err


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_it_draws_the_plan(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / f"plan{suffix}"
    assert cli.main(["plan", CAMPUS, "--plot", str(file)]) == 0
    assert file.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")
    assert capsys.readouterr().out


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["plan", CAMPUS, "--plot", str(tmp_path / "plan.png")]) == 2
    output = capsys.readouterr()
    assert "pip install matplotlib" in output.err
    assert output.out == ""


BAD = [
    ("memory: 9.1 GB", "memory: 9.1", "servers[0].memory: 9.1 has no unit"),
    ("memory: 9.1 GB", "memory: -9.1 GB", "servers[0].memory: -9.1 GB must be more than 0"),
    ("memory: 9.1 GB", "meemory: 9.1 GB", "servers[0].meemory: server has no such key"),
    ("memory: 79.1 GB", "memory: 7.9 GB", "servers: bloom-176b has 70 blocks"),
    ("site b: 100 ms, site c: 100 ms", "site b: none, site c: none", "clients[students]: no chain of servers"),
    ("site b: 100 ms, site c: 100 ms", "site b: 100 ms", "network.rtt: the RTT from site a to site c is not given"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), BAD, ids=[new for _, new, _ in BAD])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_bad_input_is_one_sentence_and_no_output(
    old: str, new: str, sentence: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(CAMPUS).read_text()
    assert old in text
    file = tmp_path / "cluster.yaml"
    file.write_text(text.replace(old, new, 1))
    figure = tmp_path / "plan.png"
    assert cli.main(["plan", str(file), "--plot", str(figure), *options]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("geopetals: error: ")
    assert output.err.count("\n") == 1
    assert sentence in output.err
    assert not figure.exists()


@pytest.mark.parametrize(
    ("name", "words"), [("plan.xyz", "must end with one of .png"), ("nowhere/plan.png", "there is no directory")]
)
def test_a_figure_that_cannot_be_drawn_is_refused(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", CAMPUS, "--plot", str(tmp_path / name)]) == 2
    output = capsys.readouterr()
    assert words in output.err
    assert output.out == ""


def test_the_command_offers_what_there_is() -> None:
    assert METHODS == methods.METHODS
    assert OBJECTIVES == ("relay", "push")


def test_planning_loads_neither_torch_nor_what_the_swarm_needs() -> None:
    code = (
        "import sys; from geopetals.cli import main; "
        f"main(['plan', {CAMPUS!r}]); main(['model', 'llama-3-8b']); "
        "print(*({'torch', 'transformers', 'hivemind', 'petals', 'ortools', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
