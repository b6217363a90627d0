"""`geopetals status`: what runs where in a swarm with a coordinator, how full it is, and how well it predicts."""

import argparse
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from geopetals.cli import asking, options
from geopetals.cli.spans import span_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

HELP = "show a running swarm: servers, blocks, load, sessions, queue and plan"
_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    asking.add_arguments(parser)
    parser.add_argument("--watch", action="store_true", help="go on showing it until Ctrl-C")
    parser.add_argument(
        "--every", type=options.seconds, default=2.0, metavar="SECONDS", help="with --watch: how often (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with --watch one object per line")


def run(args: argparse.Namespace) -> int:
    source = asking.source(args)
    if not args.watch:
        found = source.ask("status")
        if args.json:
            print(json.dumps(found, indent=2, ensure_ascii=False))
        else:
            _print(found)
        return 0
    if args.json:
        while True:
            print(json.dumps(source.ask("status"), ensure_ascii=False), flush=True)
            time.sleep(args.every)
    from rich.live import Live

    with Live(render(source.ask("status")), auto_refresh=False) as live:
        while True:
            time.sleep(args.every)
            live.update(render(source.ask("status")), refresh=True)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    Console(highlight=False).print(render(found))


def render(found: dict[str, Any]) -> "RenderableType":
    """A `status` as people read it."""
    from rich.console import Group

    parts: list[RenderableType] = [*map(plain, _head(found)), _servers(found)]
    if found["sessions"] or found["queue"]:
        parts.append(_sessions(found))
    return Group(*parts, *map(plain, _tail(found)))


def plain(text: str) -> "Text":
    """As it is: names come from outside, and are no markup."""
    from rich.text import Text

    return Text(printable(text))


def printable(text: str) -> str:
    """Without control sequences of a terminal: what is shown comes from outside."""
    return "".join(character for character in text if character.isprintable())


def _head(found: dict[str, Any]) -> Iterator[str]:
    coordinator, connected = found["coordinator"], found["coordinator"]["connected"]
    marks = " (open)" if coordinator["open"] else ""
    yield f"swarm {coordinator['swarm']}{marks}: {coordinator['model']}, {coordinator['blocks']} blocks"
    missing = _missing(found["replicas"])
    yield (
        f"{connected['server']} servers and {connected['client']} clients connected; "
        + (
            f"no server for blocks {missing}"
            if missing
            else f"all blocks served, {min(found['replicas'])} times or more"
        )
    )


def _missing(replicas: list[int]) -> str:
    """The blocks without a server, as spans."""
    spans: list[tuple[int, int]] = []
    for block in (block for block, count in enumerate(replicas) if not count):
        if spans and spans[-1][1] == block:
            spans[-1] = (spans[-1][0], block + 1)
        else:
            spans.append((block, block + 1))
    return ", ".join(map(span_text, spans))


def _servers(found: dict[str, Any]) -> "RenderableType":
    from rich.table import Table

    table = Table("server", "peer", "device", "blocks", "state", box=None, pad_edge=False)
    for name in ("sessions", "cache reserved", "of tokens", "RTT ms", "in MB/s"):
        table.add_column(name, justify="right")
    rtts, rates = _rtts(found["links"]["measured"]), _rates(found["links"].get("rates", []))
    for server in found["servers"]:
        shown = (rtts.get(server["peer"], "-"), rates.get(server["peer"], "-"))
        table.add_row(*map(plain, (*_server_cells(server), *shown)))
    return table


def _server_cells(server: dict[str, Any]) -> tuple[str, ...]:
    serving, planned = span_text(server["span"]), span_text(server["target"])
    cache = server["cache"] or {"total": 0, "free": 0}
    total = cache["total"]
    used = server["reserved_block_tokens"] + server["foreign_block_tokens"]
    kind = f"{server['device'][:12]} {server['quantization'] or server['dtype']}"
    return (
        server["name"] or "-",
        f"…{server['peer'][-6:]}" + (" *" if server["relayed"] else ""),
        kind,
        serving if serving == planned else f"{serving} > {planned}",
        server["state"],
        str(server["sessions"]),
        f"{used / total:.0%}" if total else "-",
        str(total) if total else "-",
    )


def _rtts(measured: list[list[Any]]) -> dict[str, str]:
    """The range of each server's round trips to others."""
    found: dict[str, list[float]] = {}
    for one, other, rtt_s, *_ in measured:
        for peer in (one, other):
            found.setdefault(peer, []).append(1000 * rtt_s)
    return _ranges(found)


def _rates(came: list[list[Any]]) -> dict[str, str]:
    """How fast large messages came in to each server, from the slowest and from the fastest sender."""
    found: dict[str, list[float]] = {}
    for _, receiver, bytes_per_s in came:
        found.setdefault(receiver, []).append(bytes_per_s / 1e6)
    return _ranges(found)


def _ranges(found: dict[str, list[float]]) -> dict[str, str]:
    return {peer: f"{min(values):.1f} to {max(values):.1f}" for peer, values in found.items()}


def _sessions(found: dict[str, Any]) -> "RenderableType":
    from rich.table import Table

    names = {server["peer"]: server["name"] or f"…{server['peer'][-6:]}" for server in found["servers"]}
    table = Table("session", "client", "chain", "tokens", "predicted: TTFT", "TPOT", "ends", box=None, pad_edge=False)
    for session in found["sessions"][:_SHOWN]:
        predicted = session["predicted"] or {}
        chain = " > ".join(f"{names.get(peer, peer[-6:])} {start}:{end}" for peer, start, end in session["chain"])
        cells = (
            session["session_id"][:16],
            f"…{session['client'][-6:]}",
            chain,
            f"{session['tokens_used']} of {session['max_length']}",
            _time(predicted.get("ttft_s")),
            _time(predicted.get("tpot_s")),
            f"in {_time(session['end_s'])}",
        )
        table.add_row(*map(plain, cells))
    for session in found["queue"][:_SHOWN]:
        place = f"{session['position'] + 1}. in the queue, starts in {_time(session['start_s'])}"
        table.add_row(*map(plain, (session["session_id"][:16], f"…{session['client'][-6:]}", place)))
    return table


def _tail(found: dict[str, Any]) -> Iterator[str]:
    counts, accuracy, plan = found["counts"], found["accuracy"], found["plan"]
    running, waiting = found["running"], found["waiting"]
    yield f"{running} sessions run and {waiting} wait; {counts['closed']} are done, {counts['refused']} were refused"
    demand = found["demand"]
    yield (
        f"demand: {60 * demand['arrivals_per_s']:.3g} sessions per minute of {demand['prompt_tokens']} + "
        f"{demand['output_tokens']} tokens"
    )
    if accuracy["sessions"]:
        yield (
            "measured / predicted: "
            + ", ".join(
                f"{name} {'-' if accuracy[key] is None else format(accuracy[key], '.2f')}"
                for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("whole session", "end_to_end_s"))
            )
            + f"; starts off by {_time(accuracy['start_error_s'])}"
        )
    if plan:
        yield f"plan {plan['number']} ({'adopted' if plan['adopted'] else 'not adopted'}): {plan['why']}"
    if found["plan_due"]:
        yield f"a new plan is due: {found['plan_due']}"
    if any(server["relayed"] for server in found["servers"]):
        yield "* reached through a relay"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if abs(seconds) < 1 else f"{seconds:.1f} s"
