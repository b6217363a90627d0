"""What reaches stderr besides a command's own words: our events, and of other libraries what is one step graver."""

import argparse
import logging
import os

from geopetals.credentials.redaction import RedactingFormatter
from geopetals.errors import UnsupportedInput

LEVELS = ("error", "warning", "info", "debug")
_VARIABLE = "GEOPETALS_LOG_LEVEL"
_DEFAULT = "warning"


def add_arguments(parser: argparse.ArgumentParser, *, inherited: bool = False) -> None:
    """Add `--log-level` and `-v`; `inherited` where a parent parser has set their defaults already."""
    group = parser.add_argument_group("events").add_mutually_exclusive_group()
    group.add_argument(
        "--log-level",
        choices=LEVELS,
        default=argparse.SUPPRESS if inherited else None,
        help=f"least grave event to print on stderr (default: ${_VARIABLE} or {_DEFAULT})",
    )
    group.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=argparse.SUPPRESS if inherited else 0,
        help="print more events: -v is info, -vv debug",
    )


def configure(args: argparse.Namespace) -> None:
    """Set the levels of our loggers and, before they are imported, those of hivemind, petals and transformers.

    Variables that the user has set for one of these libraries win. Raises UnsupportedInput for an unknown level in
    the environment.
    """
    level = _chosen_level(args)
    quieter = LEVELS[max(LEVELS.index(level) - 1, 0)]
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=quieter.upper(), handlers=[handler])
    logging.getLogger("geopetals").setLevel(level.upper())
    logging.captureWarnings(True)
    for name, value in _quiet_environment(quieter).items():
        os.environ.setdefault(name, value)


def _chosen_level(args: argparse.Namespace) -> str:
    if args.log_level is not None:
        return str(args.log_level)
    if args.verbose:
        return LEVELS[min(LEVELS.index(_DEFAULT) + args.verbose, len(LEVELS) - 1)]
    level = os.environ.get(_VARIABLE, _DEFAULT).lower()
    if level not in LEVELS:
        raise UnsupportedInput(f"{_VARIABLE}={level!r} is no level: set it to one of {', '.join(LEVELS)}.")
    return level


def _quiet_environment(level: str) -> dict[str, str]:
    return {
        "HIVEMIND_LOGLEVEL": level.upper(),
        "PETALS_LOGGING": "False",  # petals would give the root logger hivemind's handler: every event twice
        "TRANSFORMERS_VERBOSITY": level,
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_VERBOSITY": level,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers warns on every fork otherwise
    }
