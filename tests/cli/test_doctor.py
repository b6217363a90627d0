import json
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

import geopetals
from geopetals.cli import doctor, requirements
from geopetals.cli.requirements import PETALS, Requirement, parse, satisfies

ROOT = Path(geopetals.__file__).parents[1]


def run_doctor(python: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "geopetals", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=110)


def normalized(requirement: Requirement | None) -> str:
    """The name as package indexes compare it."""
    assert requirement is not None
    return requirement.name.lower().replace("_", "-")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python in whose environment nothing is installed, not even pip."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory, with_pip=False, symlinks=True)
    return directory / "bin" / "python"


def test_a_complete_installation_is_told_so() -> None:
    done = run_doctor(sys.executable, "--json")
    facts = json.loads(done.stdout)
    assert facts["problems"] == []
    assert done.returncode == 0
    assert facts["ok"] is True
    assert {package["state"] for package in facts["packages"]} == {"ok"}
    assert Path(facts["p2pd"]).is_file()
    assert facts["cpu_cores"] >= 1
    assert 0 < facts["memory"]["free_bytes"] <= facts["memory"]["total_bytes"]


def test_it_knows_all_dependencies_that_the_project_declares() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {normalized(parse(line)) for line in (*declared, PETALS)}
    assert wanted == {normalized(package) for package in requirements.requirements()}


def test_petals_is_wanted_in_the_version_that_the_stack_is_made_for() -> None:
    source = (ROOT / "geopetals" / "swarm" / "stack.py").read_text()
    assert f'PETALS_VERSION = "{PETALS.removeprefix("petals==")}"' in source


def test_an_empty_environment_gets_a_command_for_each_problem(bare_python: Path) -> None:
    done = run_doctor(bare_python, "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 1
    assert done.stderr == ""
    assert {package["state"] for package in facts["packages"]} == {"missing"}
    commands = [problem["mend"] for problem in facts["problems"]]
    assert any("'torch>=" in command and "'hivemind>=" in command for command in commands)
    assert any(command.endswith(f"--no-deps {PETALS}") for command in commands)
    assert all(str(bare_python) in command for command in commands)


def test_an_empty_environment_is_described_to_people_too(bare_python: Path) -> None:
    done = run_doctor(bare_python)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "torch is not installed" in done.stdout
    assert "not installed: " in done.stdout
    assert "cores" in done.stdout


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.13", True),
        ("2.12.1", ">=2.13", False),
        ("10.0", ">=9.2", True),
        ("5", ">=5.0.0", True),
        ("2.2.0.post1", "==2.2.0.post1", True),
        ("2.2.0", "==2.2.0.post1", False),
        ("1.5", ">=1.2,<2", True),
        ("2.0", ">=1.2,<2", False),
        ("3.11.7", "", True),
    ],
)
def test_versions_are_compared_by_number(version: str, wanted: str, fits: bool) -> None:
    assert satisfies(version, wanted) is fits


@pytest.mark.parametrize(
    ("line", "name", "wanted"),
    [
        ("torch>=2.13", "torch", ">=2.13"),
        ("uvloop>=0.21; sys_platform != 'win32'", "uvloop", ">=0.21"),
        ("petals == 2.2.0.post1", "petals", "==2.2.0.post1"),
        ("tool[extra]>=1,<2", "tool", ">=1,<2"),
        ("bare-name", "bare-name", ""),
    ],
)
def test_lines_of_metadata_are_read(line: str, name: str, wanted: str) -> None:
    requirement = parse(line)
    assert requirement is not None
    assert (requirement.name, requirement.wanted) == (name, wanted)


def test_what_belongs_to_an_extra_is_not_wanted() -> None:
    assert parse('pytest>=8; extra == "dev"') is None


def test_an_old_package_is_named_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Requirement(name="torch", wanted=">=2.13", installed="1.9")
    monkeypatch.setattr(doctor, "requirements", lambda: [old])
    (problem,) = doctor.examine().problems
    assert problem.what == "torch 1.9 is not >=2.13"
    assert "install 'torch>=2.13'" in problem.mend


def test_a_p2pd_that_is_not_executable_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "p2pd"
    program.write_text("")
    program.chmod(0o644)
    monkeypatch.setattr(doctor, "_p2pd", lambda: program)
    assert f"chmod +x {program}" in [problem.mend for problem in doctor.examine().problems]


def test_a_p2pd_for_another_machine_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "p2pd"
    program.write_bytes(b"\x7fELF no program")
    program.chmod(0o755)
    monkeypatch.setattr(doctor, "_p2pd", lambda: program)
    assert any("p2pd does not run here" in problem.what for problem in doctor.examine().problems)


def test_without_pip_the_command_is_for_uv_where_uv_made_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.1\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    command = requirements.install_command(["torch>=2.13"])
    assert command == f"uv pip install --python {sys.executable} 'torch>=2.13'"
