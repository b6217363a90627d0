"""The options by which commands find a running coordinator."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from geopetals.cli import options

if TYPE_CHECKING:
    from geopetals.coordinator.remote import Source


def add_arguments(parser: argparse.ArgumentParser, *, http: bool = True) -> None:
    where = parser.add_argument_group(
        "which coordinator", "default: the one whose state is on this machine"
    ).add_mutually_exclusive_group()
    where.add_argument(
        "--join",
        type=options.join_token,
        metavar="TOKEN",
        help="an admin's join token; asks over the swarm, from anywhere",
    )
    where.add_argument("--state", type=Path, metavar="DIR", help="the state of a coordinator on this machine")
    if http:
        where.add_argument("--url", help="its --http address, like http://127.0.0.1:8470")
        parser.add_argument("--http-token", metavar="TEXT", help="with --url (default: $GEOPETALS_HTTP_TOKEN)")


def source(args: argparse.Namespace) -> "Source":
    """Raises GeoPetalsError."""
    from geopetals.coordinator.folders import only_state
    from geopetals.coordinator.remote import source_of

    return source_of(
        join=args.join,
        url=getattr(args, "url", None),
        state=args.state,
        http_token=getattr(args, "http_token", None) or os.environ.get("GEOPETALS_HTTP_TOKEN"),
        default=only_state,
    )
