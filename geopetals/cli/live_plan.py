"""`geopetals plan --live`: the plan that a running coordinator follows, and why."""

import argparse
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from geopetals.cli import asking
from geopetals.cli.spans import span_text
from geopetals.cli.status import printable
from geopetals.errors import UnsupportedInput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the plan of a running coordinator")
    group.add_argument("--live", action="store_true", help="show it instead of planning a file")
    group.add_argument("--explain", action="store_true", help="with --live: what was decided lately, and why")
    group.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="with --live: write the cluster that it was made for, to plan it again",
    )
    asking.add_arguments(parser)


def check_unused(args: argparse.Namespace) -> None:
    """Raises UnsupportedInput for options that go together with --live alone."""
    for name in ("explain", "save", "join", "state", "url"):
        if getattr(args, name):
            raise UnsupportedInput(f"--{name} is about the plan of a running coordinator: add --live.")


def run(args: argparse.Namespace) -> int:
    if args.cluster is not None:
        raise UnsupportedInput("a file and --live do not go together: leave one of them out.")
    found = asking.source(args).ask("plan")
    if args.save is not None:
        _save(found.get("cluster"), args.save)
    if args.json:
        kept = found if args.explain else {key: value for key, value in found.items() if key != "history"}
        print(json.dumps(kept, indent=2, ensure_ascii=False))
    else:
        lines = [*_plan_lines(found), *(_history_lines(found["history"]) if args.explain else ())]
        print("\n".join(map(printable, lines)))
    return 0


def _save(cluster: Any, file: Path) -> None:
    if cluster is None:
        raise UnsupportedInput("the coordinator has no servers yet: there is no cluster to save.")
    try:
        file.write_text(json.dumps(cluster, indent=2) + "\n")
    except OSError as error:
        raise UnsupportedInput(f"cannot write {file} ({error.strerror}): choose another file.") from error


def _plan_lines(found: dict[str, Any]) -> Iterator[str]:
    coordinator, plan = found["coordinator"], found["plan"]
    yield f"swarm {coordinator['swarm']}: {coordinator['model']}, {coordinator['blocks']} blocks"
    for server in found["servers"]:
        serving, target = span_text(server["span"]), span_text(server["target"])
        where = serving if serving == target else f"{serving} > {target}"
        yield f"{server['name'] or '-':<20}  …{server['peer'][-6:]}  {where:<16}  {server['state']}"
    if not plan:
        yield "no plan has been made yet"
        return
    yield f"plan {plan['number']}, {'adopted' if plan['adopted'] else 'not adopted'}: {plan['why']}"
    yield f"made because {plan['reason']}; for {plan['sessions']} sessions at once" + (
        "" if plan["session_s"] is None else f", each of which takes {plan['session_s']:.2f} s"
    )


def _history_lines(history: list[dict[str, Any]]) -> Iterator[str]:
    yield ""
    for entry in history:
        at = datetime.fromtimestamp(entry["at"]).strftime("%Y-%m-%d %H:%M:%S")
        yield f"{at}  {entry['what']}"
        yield f"    why: {entry['why']}"
        if entry["predicted"]:
            yield f"    predicted: {_facts(entry['predicted'])}"
        if entry["replaced"]:
            yield f"    replaced: {_facts(entry['replaced'])}"


def _facts(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in facts.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) == 2:
        return span_text(value)
    return str(value)
