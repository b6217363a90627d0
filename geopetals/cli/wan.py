"""`geopetals wan`: a wide-area network on this machine, to run servers and clients in."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geopetals.cli import wan_options as options

if TYPE_CHECKING:
    from geopetals.wan.state import StateDirectory

HELP = "emulate a wide-area network on this machine: hosts with delays, limits, losses and NATs between them"
_TARGET = "A-B for a pair of hosts, 'A>B' for one direction, A for all links of a host, or `all`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `geopetals wan`, each with its options."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, add, run_action, about in _ACTIONS:
        action = actions.add_parser(name, help=about, description=about, allow_abbrev=False)
        add(action)
        which = action.add_mutually_exclusive_group()
        which.add_argument("--name", default="wan", help="which network, if there are several (default: wan)")
        which.add_argument("--state", metavar="DIR", type=Path, help="a directory of its own to keep it in")
        action.set_defaults(action=run_action)


def run(args: argparse.Namespace) -> int:
    """Run the action."""
    action: Callable[[argparse.Namespace], int] = args.action
    return action(args)


def _add_exec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("host", metavar="HOST", help="in which host")
    parser.add_argument("program", metavar="-- PROGRAM [ARG ...]", nargs=argparse.REMAINDER, help="what to run")


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help=_TARGET)
    parser.add_argument("rtt", metavar="RTT", nargs="?", type=options.duration, help="such as 80ms")
    options.add_link_options(parser)
    parser.add_argument("--up", metavar="RATE", type=options.rate, help="of a host's line, or `none`")
    parser.add_argument("--down", metavar="RATE", type=options.rate, help="of a host's line, or `none`")


def _add_cut(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help=_TARGET)


def _add_heal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", nargs="?", help=f"{_TARGET}; without it, whatever is cut")


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", nargs="?", help=f"show links too: {_TARGET}")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in seconds and bits per second")
    parser.add_argument("--reset", action="store_true", help="begin a run: the next counts start at 0")


def _add_down(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _directory(args: argparse.Namespace) -> "StateDirectory":
    from geopetals.wan.state import StateDirectory, named_directory

    return StateDirectory(args.state.expanduser() if args.state is not None else named_directory(args.name))


def _ask(args: argparse.Namespace, **message: object) -> Any:
    from geopetals.wan import control

    return control.request(_directory(args).path, message)


def _up(args: argparse.Namespace) -> int:
    from geopetals.wan.wan import start

    state = start(_directory(args), options.spec(args)).state
    if args.json:
        print(json.dumps(state, ensure_ascii=False))
        return 0
    print("\n".join(_hosts(state)))
    where = "" if args.state is None and args.name == "wan" else f" {_which(args)}"
    print(f"geopetals wan exec{where} {next(iter(state['hosts']))!r} -- PROGRAM runs a program in a host.")
    if not state["realtime"]:
        print(
            "geopetals: the router has no real-time priority (it needs root, or a limit for rtprio): expect packets to "
            "be late when the processors are busy.",
            file=sys.stderr,
        )
    return 0


def _exec(args: argparse.Namespace) -> int:
    """Never returns if all goes well: this process becomes the program."""
    from geopetals.wan import control, enter
    from geopetals.wan.errors import WanError, WanFailure

    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        raise WanError("there is no program to run: write it behind the host, as in `wan exec A -- hostname`.")
    directory = _directory(args).path
    try:
        files = enter.fetch(str(directory), args.host)
    except LookupError as error:
        raise WanError(str(error.args[0])) from error
    except OSError as error:
        raise control.unreachable(directory, error) from error
    try:
        enter.enter(files)
    except OSError as error:
        raise WanFailure(f"{args.host!r} cannot be entered ({error.strerror}): run this as who started it.") from error
    return enter.execute(program, _own_environment())


def _own_environment() -> Mapping[str, str]:
    """What this process was started with, without what commands set for libraries that they load."""
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ
    pairs = (entry.partition(b"=") for entry in entries if entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def _set(args: argparse.Namespace) -> int:
    from geopetals.wan.changes import Change

    change = Change(
        rtt_s=args.rtt,
        jitter_s=args.jitter,
        loss=args.loss,
        bandwidth_bit_per_s=args.bandwidth,
        up_bit_per_s=args.up,
        down_bit_per_s=args.down,
    )
    _ask(args, do="change", target=args.target, change=change.to_value())
    return 0


def _cut(args: argparse.Namespace) -> int:
    _ask(args, do="cut", target=args.target)
    return 0


def _heal(args: argparse.Namespace) -> int:
    _ask(args, do="heal", target=args.target)
    return 0


def _status(args: argparse.Namespace) -> int:
    state = _ask(args, do="status")
    links = None if args.target is None else _ask(args, do="links", target=args.target)
    if args.reset:
        state["run"] = _ask(args, do="reset")
    if args.json:
        print(json.dumps(state if links is None else state | {"links": links}, ensure_ascii=False))
    else:
        print("\n".join([*_hosts(state), *_links(links or []), *_run(state)]))
    return 0


def _down(args: argparse.Namespace) -> int:
    from geopetals.wan.wan import down

    there_was_one = down(_directory(args))
    if args.json:
        print(json.dumps({"down": there_was_one}))
    elif not there_was_one:
        print(f"no network {_which(args)} runs.")
    return 0


def _which(args: argparse.Namespace) -> str:
    return f"--state {args.state}" if args.state is not None else f"--name {args.name}"


def _hosts(state: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, state["hosts"]))
    for name, host in state["hosts"].items():
        lines = [f"{way} {_rate(host[f'{way}_bit_per_s'])}" for way in ("up", "down") if host[f"{way}_bit_per_s"]]
        nat = f"{host['address']} behind a {host['nat']} NAT" if host["nat"] else ""
        cut = "cut" if name in state.get("cut_hosts", ()) else ""
        yield "  ".join(filter(None, [name.ljust(width), host["public_address"].ljust(11), nat, *lines, cut])).rstrip()


def _links(links: list[dict[str, Any]]) -> Iterator[str]:
    for link in links:
        rtt = "no link" if link["rtt_s"] is None else f"{link['rtt_s'] * 1e3:g} ms"
        extra = [f"jitter {link['jitter_s'] * 1e3:g} ms"] if link["jitter_s"] else []
        extra += [f"loss {link['loss']:.3g}"] if link["loss"] else []
        extra += [_rate(link["bandwidth_bit_per_s"])] if link["bandwidth_bit_per_s"] else []
        extra += ["cut"] if link["cut"] else []
        yield f"{link['from']} > {link['to']}: " + ", ".join([rtt, *extra, f"{link['packets']} packets"])


def _run(state: Mapping[str, Any]) -> Iterator[str]:
    for start, end in state["cut_links"]:
        yield f"cut: {start} > {end}"
    if state["dilation"] != 1:
        yield f"time passes {state['dilation']:g} times slower in this network: all delays are that much longer."
    run = state["run"]
    late = run["lateness"]
    yield (
        f"{late['packets']} packets in {run['seconds']:.1f} s, late by {late['p50_s'] * 1e3:.2f} ms (p50), "
        f"{late['p99_s'] * 1e3:.2f} ms (p99), {late['max_s'] * 1e3:.2f} ms at most; "
        f"router {run['router_cpu_share']:.0%} of a processor"
    )
    dropped = {reason.replace("_", " "): count for reason, count in run["dropped"].items() if count}
    if dropped:
        yield "dropped: " + ", ".join(f"{count} ({reason})" for reason, count in dropped.items())


def _rate(bit_per_s: float) -> str:
    from geopetals.cluster.quantities import BANDWIDTH

    return BANDWIDTH.format(bit_per_s)


_Action = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]
_ACTIONS: tuple[_Action, ...] = (
    ("up", options.add_up, _up, "start a network and return when it is ready"),
    ("exec", _add_exec, _exec, "run a program in a host"),
    ("set", _add_set, _set, "change delays, jitter, loss and bandwidth while the network runs"),
    ("cut", _add_cut, _cut, "let nothing pass a host or a pair any more"),
    ("heal", _add_heal, _heal, "undo cuts"),
    ("status", _add_status, _status, "show hosts, links, and how late packets were handed on"),
    ("down", _add_down, _down, "end every process in the hosts, and the network"),
)
