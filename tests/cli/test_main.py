import argparse
import importlib.machinery
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import geopetals
from geopetals import cli
from geopetals.cli import logs
from geopetals.errors import NoChain, TokenError

ROOT = Path(geopetals.__file__).parents[1]
Run = Callable[[argparse.Namespace], int]


def geopetals_process(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "geopetals", *arguments]
    return subprocess.run(command, text=True, cwd=ROOT, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Makes `geopetals probe` run the given function."""

    def install(run: Run) -> None:
        module = types.ModuleType("geopetals.cli.probe")
        module.__spec__ = importlib.machinery.ModuleSpec("geopetals.cli.probe", None)
        vars(module).update(HELP="For tests.", add_arguments=lambda parser: None, run=run)
        monkeypatch.setitem(sys.modules, "geopetals.cli.probe", module)

    monkeypatch.setattr(cli, "COMMANDS", ("probe",))
    monkeypatch.setattr(logs, "configure", lambda args: None)
    return install


def raising(error: BaseException) -> Run:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_the_exit_code_is_the_commands_own(command: Callable[[Run], None]) -> None:
    command(lambda args: 1)
    assert cli.main(["probe"]) == 1


@pytest.mark.parametrize(
    "error", [TokenError("the token ends too early:\ncopy all of it."), NoChain("blocks 1:2 are gone.")]
)
def test_an_expected_failure_is_one_line_on_stderr(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str], error: TokenError | NoChain
) -> None:
    command(raising(error))
    assert cli.main(["probe"]) == error.exit_code
    output = capsys.readouterr()
    assert output.err == f"geopetals: error: {' '.join(str(error).split())}\n"
    assert output.out == ""


def test_a_missing_package_is_told_with_the_command_that_helps(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        import a_package_nobody_has  # type: ignore[import-not-found]

        return int(a_package_nobody_has)

    command(run)
    assert cli.main(["probe"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "a_package_nobody_has" in message
    assert "geopetals doctor" in message


def test_a_missing_module_of_our_own_is_a_bug_and_shows_its_traceback(command: Callable[[Run], None]) -> None:
    command(raising(ModuleNotFoundError("No module named 'geopetals.nowhere'", name="geopetals.nowhere")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["probe"])


def test_interrupting_is_quiet(command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    command(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_connection_that_breaks_is_no_quiet_matter(
    command: Callable[[Run], None], capfd: pytest.CaptureFixture[str]
) -> None:
    command(raising(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        cli.main(["probe"])


PRINTS_MUCH = """
import sys
from geopetals import cli
from geopetals.cli import doctor
doctor.run = lambda args: print("fact\\n" * 100_000) or 0
sys.exit(cli.main(["doctor"]))
"""
PRINTS_LITTLE = PRINTS_MUCH.replace("100_000", "1")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("program", [PRINTS_MUCH, PRINTS_LITTLE])
def test_a_reader_that_leaves_is(program: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60, env=environment
        )
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-command"], ["doctor", "--no-such-option"], ["--log-level", "loud", "doctor"]]
)
def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_version_and_help_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"geopetals {geopetals.__version__}\n"
    assert cli.main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["doctor", "--help"]])
def test_answering_needs_no_installed_package(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "geopetals", *arguments], text=True, cwd=ROOT, capture_output=True, timeout=60
    )
    assert "usage: geopetals" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


LEVELS_SEEN = """
import logging, os, sys
from geopetals import cli
from geopetals.cli import doctor
def run(args):
    for name in ("geopetals.swarm", "another_library"):
        print(name, logging.getLevelName(logging.getLogger(name).getEffectiveLevel()))
    print("hivemind", os.environ["HIVEMIND_LOGLEVEL"])
    return 0
doctor.run = run
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "ours", "theirs"),
    [
        (["doctor"], "WARNING", "ERROR"),
        (["-v", "doctor"], "INFO", "WARNING"),
        (["doctor", "-vv"], "DEBUG", "INFO"),
        (["--log-level", "error", "doctor"], "ERROR", "ERROR"),
        (["doctor", "--log-level", "debug"], "DEBUG", "INFO"),
    ],
)
def test_other_libraries_are_one_step_quieter(arguments: list[str], ours: str, theirs: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEVELS_SEEN, *arguments],
        text=True,
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=60,
    )
    seen = dict(line.split() for line in done.stdout.splitlines())
    assert seen["geopetals.swarm"] == ours
    assert seen["another_library"] == theirs
    assert seen["hivemind"] == theirs


def test_an_unknown_level_in_the_environment_is_named() -> None:
    environment = {**os.environ, "GEOPETALS_LOG_LEVEL": "loud"}
    done = geopetals_process("doctor", capture_output=True, env=environment)
    assert done.returncode == 2
    assert "GEOPETALS_LOG_LEVEL='loud'" in done.stderr
