"""The `geopetals` command: one module per subcommand, and how expected failures reach the person at the terminal.

A command module exposes `HELP: str`, `add_arguments(parser)` and `run(args) -> int`. It imports torch, transformers,
hivemind and petals inside `run` only: `geopetals --help` answers at once, and `geopetals doctor` works without them.
"""

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import Protocol, cast

import geopetals
from geopetals.cli import logs
from geopetals.errors import GeoPetalsError
from geopetals.swarm.spinning import spin_briefly

COMMANDS = (
    "coordinator",
    "status",
    "replan",
    "serve",
    "relay",
    "token",
    "up",
    "generate",
    "chat",
    "api",
    "demo",
    "plan",
    "simulate",
    "bench",
    "wan",
    "model",
    "doctor",
)
INTERRUPTED = 130
READER_GONE = 141


class Command(Protocol):
    """What a command module offers."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 1 failed, 2 the user has to change something, 130 interrupted, 141 nobody reads the output any more.
    """
    spin_briefly()
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        if not _nobody_reads_stdout():
            raise
        _discard_stdout()
        return READER_GONE
    except GeoPetalsError as error:
        return _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "geopetals":
            raise
        return _fail(
            f"the Python package '{error.name}' is missing: run `geopetals doctor`, it prints what to install.", 2
        )


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; the chosen command's module is `args.command`."""
    parser = argparse.ArgumentParser(
        prog="geopetals", description="Run large language models over many people's machines.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"geopetals {geopetals.__version__}")
    logs.add_arguments(parser)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = cast(Command, importlib.import_module(f"geopetals.cli.{name}"))
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP, allow_abbrev=False)
        command.add_arguments(subparser)
        logs.add_arguments(subparser, inherited=True)
        subparser.set_defaults(command=command)
    return parser


def _dispatch(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        sys.stdout.flush()
        return stop.code if isinstance(stop.code, int) else 0
    logs.configure(args)
    return cast(Command, args.command).run(args)


def _fail(message: str, code: int) -> int:
    print(f"geopetals: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _nobody_reads_stdout() -> bool:
    """Tell `geopetals doctor | head -1` from a broken connection elsewhere, which is no quiet matter."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def _discard_stdout() -> None:
    """The interpreter flushes stdout once more on its way out: let that succeed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
