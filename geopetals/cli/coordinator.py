"""`geopetals coordinator`: a swarm's first peer, which decides who holds which blocks and who takes which chain."""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geopetals.cli import options
from geopetals.cli.file_limit import raise_file_limit
from geopetals.errors import UnsupportedInput

if TYPE_CHECKING:
    from geopetals.coordinator.app import CoordinatorConfig, Running
    from geopetals.coordinator.core import Settings
    from geopetals.coordinator.store import Store

HELP = "coordinate a swarm: its first peer, registry, planner and admission desk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="Hub id or local directory; its config is read, no weights are loaded")
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="where keys, plan and log are kept (default: a folder per swarm)"
    )
    parser.add_argument(
        "--tokens", type=Path, metavar="DIR", help="also write the join tokens of servers and clients into this folder"
    )
    parser.add_argument("--name", help="the swarm's name (default: the model's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=options.port, default=0, help="TCP port (default: last time's, or a free one)")
    parser.add_argument("--public-ip", metavar="IP", help="address to announce, where --host is not what others see")
    parser.add_argument(
        "--open", action="store_true", help="let stock PETALS clients use cache that is not reserved, without a ticket"
    )
    parser.add_argument(
        "--relays", nargs="+", metavar="ADDRESS", help="relays for servers behind NAT, to be named in join tokens"
    )
    parser.add_argument(
        "--http",
        type=http_address,
        metavar="HOST:PORT",
        help="serve status, plan, history and metrics (default: do not)",
    )
    parser.add_argument(
        "--http-token",
        metavar="TEXT",
        help="bearer token that HTTP asks for, needed beyond loopback (default: $GEOPETALS_HTTP_TOKEN)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument(
        "--dtype", type=options.dtype_name, help="what most servers compute in (default: as the model is stored)"
    )
    parser.add_argument("--quantization", choices=("int8", "nf4"), help="what most servers hold the weights in")
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help="YAML or JSON with numbers to decide by; see docs/coordinator.md"
    )
    actions = parser.add_subparsers(title="actions", metavar="", dest="action")
    backup = actions.add_parser("backup", help="copy the state while the coordinator runs or not")
    backup.add_argument("file", type=Path, metavar="FILE", help="where to write the copy of the database")
    replay = actions.add_parser("replay", help="decide what was recorded once more, and compare")
    replay.add_argument("--json", action="store_true", help="print one JSON object")
    for action in (backup, replay):
        action.add_argument("--state", type=Path, metavar="DIR", help="the coordinator's state", dest="other_state")


def http_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[IPv6]:PORT` or `:PORT` for loopback."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]*):(\d{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no address: write HOST:PORT, for example 127.0.0.1:8470.")
    return match[1].strip("[]") or "127.0.0.1", options.port(match[2])


def run(args: argparse.Namespace) -> int:
    if args.action is not None:
        return _replay(args) if args.action == "replay" else _back_up(args)
    if args.model is None:
        raise UnsupportedInput("say which model the swarm serves with --model.")
    _check_http(args)
    from geopetals.client.runtime import new_event_loop
    from geopetals.coordinator.app import Coordinator
    from geopetals.coordinator.tokens import hand_out
    from geopetals.progress import Console

    config = _config(args)

    def ready(running: "Running") -> None:
        if args.tokens is not None:
            hand_out(running.tokens, args.tokens)
        _tell(running, config)

    coordinator = Coordinator(config, ready, reporter=Console())
    raise_file_limit()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_run(coordinator))
    return 0


async def _run(coordinator: Any) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await coordinator.run(stop)


def _config(args: argparse.Namespace) -> "CoordinatorConfig":
    from geopetals.coordinator.app import CoordinatorConfig
    from geopetals.coordinator.folders import state_folder
    from geopetals.coordinator.model import open_model
    from geopetals.join_token import check_swarm_name, swarm_name_for
    from geopetals.progress import Console

    swarm = check_swarm_name(args.name or swarm_name_for(args.model))
    model = open_model(
        args.model, revision=args.revision, dtype=args.dtype, weights=args.quantization, reporter=Console()
    )
    return CoordinatorConfig(
        model=model,
        state=(args.state or state_folder(swarm)).expanduser().absolute(),
        swarm=swarm,
        host=args.host,
        port=args.port,
        public_ip=args.public_ip,
        is_open=args.open,
        relays=tuple(args.relays or ()),
        http=args.http,
        http_token=_http_token(args),
        settings=_settings(args.settings),
    )


def _settings(path: Path | None) -> "Settings":
    from geopetals.cluster_io import read_document
    from geopetals.coordinator.codec import MessageError
    from geopetals.coordinator.core import Settings

    given: Any = {"plan_inline": False}
    if path is not None:
        document, _ = read_document(path)
        if not isinstance(document, dict):
            raise UnsupportedInput(f"{path} has to be a map of settings.")
        unknown = sorted(set(map(str, document)) - set(Settings().to_dict()))
        if unknown:
            raise UnsupportedInput(f"{path} has no setting named {unknown[0]!r}: docs/coordinator.md lists them.")
        given |= document
    try:
        return Settings.from_dict(given)
    except MessageError as error:
        raise UnsupportedInput(f"{path}: {error}.") from error


def _http_token(args: argparse.Namespace) -> str | None:
    return args.http_token or os.environ.get("GEOPETALS_HTTP_TOKEN")


def _check_http(args: argparse.Namespace) -> None:
    from geopetals.swarm.p2pd_options import is_loopback

    if args.http is not None and not is_loopback(args.http[0]) and not _http_token(args):
        raise UnsupportedInput(
            f"--http {args.http[0]} can be reached from other machines: protect it with --http-token, or use 127.0.0.1."
        )


def _back_up(args: argparse.Namespace) -> int:
    with _opened(args) as (store, state):
        store.backup(args.file)
    print(f"copied the database of {state} to {args.file}; keys and tokens stay in {state}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    """1 if any decision is another one."""
    from geopetals.coordinator.recorded import replay_store

    with _opened(args) as (store, _):
        found = replay_store(store)
    if args.json:
        differences = [asdict(difference) for difference in found.differences]
        print(json.dumps({"events": len(found.decisions), "differences": differences}, default=repr))
    else:
        print(f"{len(found.decisions)} events replayed, {len(found.differences) or 'no'} differences")
        for difference in found.differences:
            print(f"event {difference.number}: recorded {difference.recorded}, replayed {difference.replayed}")
    return 1 if found.differences else 0


@contextlib.contextmanager
def _opened(args: argparse.Namespace) -> "Iterator[tuple[Store, Path]]":
    """The database of a coordinator that runs or not, and its folder."""
    from geopetals.coordinator.folders import only_state
    from geopetals.coordinator.store import Store, StoreError

    state = args.other_state or args.state or only_state()
    file = state / "coordinator.db"
    if not file.exists():
        raise StoreError(f"no coordinator has kept its state in {state}: say --state.")
    with contextlib.closing(Store(file)) as store:
        yield store, state


def _tell(running: "Running", config: "CoordinatorConfig") -> None:
    model = config.model
    lines = [
        f"coordinating swarm {config.swarm} of {model.name}, {model.facts.num_blocks} blocks; state in {config.state}",
        f"peer {running.peer_id} at {', '.join(running.addresses)}",
    ]
    if running.events:
        lines.append(f"recovered the state after {running.events} events ({running.replayed} since the last snapshot)")
    if config.is_open:
        lines.append("open: stock PETALS clients are served without a ticket, see docs/security.md")
    if running.http is not None:
        lines.append(f"status at {running.http}/status")
    lines += [
        f"to add a server:  geopetals serve --join {running.tokens['server']}",
        f'to generate as a client:  geopetals generate --join {running.tokens["client"]} "The sun rises in the"',
        f"to look after it:  geopetals status --state {config.state}",
    ]
    print("\n".join(lines), flush=True)
