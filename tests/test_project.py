"""What is true of the repository as a whole: its metadata, its entry points, and what its commands may import."""

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PETALS = "petals==2.2.0.post1"
HEAVY = {"accelerate", "hivemind", "numpy", "petals", "torch", "transformers"}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def declared() -> list[Requirement]:
    project = PYPROJECT["project"]
    return [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def sources() -> list[Path]:
    return sorted((ROOT / "geopetals").rglob("*.py"))


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("requirement", declared(), ids=lambda requirement: requirement.name)
def test_the_tested_version_satisfies_the_declared_dependency(requirement: Requirement) -> None:
    pinned = constraints().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"constraints.txt does not pin {requirement.name}: run `make constraints`"
    assert requirement.specifier.contains(pinned)


@pytest.mark.parametrize("requirement", declared(), ids=lambda requirement: requirement.name)
def test_every_dependency_has_a_lower_bound(requirement: Requirement) -> None:
    assert any(specifier.operator in {">=", "=="} for specifier in requirement.specifier)


def test_constraints_are_exact_versions_for_any_machine() -> None:
    for name, version in constraints().items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version} has a local label, or is not a version"


def test_every_import_of_the_package_is_a_declared_dependency() -> None:
    distributions = packages_distributions()
    names = {canonicalize_name(requirement.name) for requirement in declared()} | {"petals"}
    undeclared = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in sources()
        for module in (name.partition(".")[0] for name in imported_modules(path))
        if module != "geopetals" and module not in sys.stdlib_module_names
        if not names & {canonicalize_name(name) for name in distributions.get(module, [])}
    }
    assert not undeclared


def test_petals_is_imported_in_one_module_only() -> None:
    importers = {path for path in sources() if any(m.partition(".")[0] == "petals" for m in imported_modules(path))}
    assert importers <= {ROOT / "geopetals/swarm/stack.py"}


def test_the_release_of_petals_is_the_same_everywhere() -> None:
    assert PYPROJECT["dependency-groups"]["petals"] == [PETALS]
    assert f"PETALS := {PETALS}" in (ROOT / "Makefile").read_text()
    assert PETALS in (ROOT / "Dockerfile").read_text()
    assert all(requirement.name != "petals" for requirement in declared()), "its metadata cannot be satisfied"


def test_the_notice_names_what_the_project_builds_upon() -> None:
    notice = (ROOT / "NOTICE").read_text()
    assert all(name in notice for name in ("petals 2.2.0.post1", "hivemind", "SmolLM2-135M-Instruct"))
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_the_readme_gives_both_ways_to_install() -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"pip install --no-deps {PETALS}" in readme
    assert "uv sync" in readme or "uv pip install" in readme


def test_ci_runs_the_make_targets_and_nothing_else() -> None:
    script = [line.strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert script[-1] == "make check test test-live"
    assert sum(line.startswith("make ") for line in script) == 1
    assert "set -euo pipefail" in script


def test_every_make_target_of_ci_and_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    wanted = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert wanted | {"check", "test", "test-live", "demo", "latest"} <= targets


LIGHT_COMMANDS = {
    "import": "import geopetals",
    "help": "from geopetals.cli import main; main(['--help'])",
    "version": "from geopetals.cli import main; main(['--version'])",
}


MODULES_AFTER = """
import json, sys
try:
    {command}
except SystemExit:
    pass
print()
print(json.dumps(list(sys.modules)))
"""


@pytest.mark.parametrize("command", LIGHT_COMMANDS.values(), ids=LIGHT_COMMANDS.keys())
def test_light_commands_load_no_heavy_package(command: str) -> None:
    result = run(sys.executable, "-c", MODULES_AFTER.format(command=command))
    assert result.returncode == 0, result.stderr
    assert not HEAVY & set(json.loads(result.stdout.splitlines()[-1]))


def test_help_takes_less_than_half_a_second_of_a_processor() -> None:
    def used_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def seconds() -> float:
        before_s = used_s()
        assert run(sys.executable, "-m", "geopetals", "--help").returncode == 0
        return used_s() - before_s

    assert min(seconds() for _ in range(5)) < 0.5


GUARDED_TESTS = {
    "passes": ("def test(): pass", 0, "1 passed"),
    "skipped": (
        "import pytest\ndef test(): pass\n@pytest.mark.skip('why')\ndef test_two(): pass",
        1,
        "case.py::test_two was skipped",
    ),
    "allowed_skip": (
        "import pytest\ndef test(): pass\n@pytest.mark.skip('why')\ndef test_allowed(): pass",
        0,
        "1 skipped",
    ),
    "absent_module": ("import pytest\npytest.importorskip('no_such_module')", 5, "case.py was skipped"),
    "no_test": ("", 5, "no tests ran"),
    "only_skips": ("import pytest\n@pytest.mark.skip('why')\ndef test_allowed(): pass", 5, "no test was executed"),
    "process_left": (
        "import subprocess, sys\ndef test(): subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])",
        1,
        "outlived the tests",
    ),
    "orphan_left": (
        "import subprocess\ndef test(): subprocess.run('sleep 99 >/dev/null 2>&1 &', shell=True)",
        1,
        "outlived the tests: sleep 99",
    ),
    "file_left": ("import tempfile\ndef test(): tempfile.mkstemp(prefix='forgotten')", 1, "the tests left forgotten"),
}


@pytest.mark.parametrize(("code", "status", "words"), GUARDED_TESTS.values(), ids=GUARDED_TESTS.keys())
def test_the_run_guard_in_ci(code: str, status: int, words: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "conftest.py")
    (tmp_path / "ci_skips.txt").write_text("test_case.py::test_allowed # needs hardware\n")
    (tmp_path / "test_case.py").write_text(code)
    result = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_case.py", cwd=tmp_path, CI="true")
    assert words in result.stdout, result.stdout + result.stderr
    assert result.returncode == status
