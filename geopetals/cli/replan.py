"""`geopetals replan`: ask the coordinator for a new plan now."""

import argparse
import json

from geopetals.cli import asking

HELP = "have the coordinator look for a better plan now"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    asking.add_arguments(parser, http=False)
    parser.add_argument("--reason", default="an operator asked", metavar="TEXT", help="to be kept in the history")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    answer = asking.source(args).ask("replan", {"reason": args.reason})
    if args.json:
        print(json.dumps(answer))
    else:
        print("asked; `geopetals plan --live --explain` shows what came of it")
    return 0
