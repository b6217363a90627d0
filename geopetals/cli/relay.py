"""`geopetals relay`: pass on what others send to servers behind NAT."""

import argparse
import asyncio
import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from geopetals.cli import options
from geopetals.units import in_units

if TYPE_CHECKING:
    from geopetals.swarm.relay import ReadyRelay, Relay

HELP = "pass on what others send to servers behind NAT (on a machine with a public address)"
_PORT = 31331


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--join", type=options.join_token, metavar="TOKEN", help="make the relay known to the servers of this swarm"
    )
    where.add_argument("--initial-peers", nargs="+", metavar="ADDRESS", help="libp2p addresses instead of a token")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all of this machine's)")
    parser.add_argument("--port", type=options.port, default=_PORT, help=f"TCP port (default: {_PORT})")
    parser.add_argument("--public-ip", metavar="IP", help="address to announce, where --host is not what others see")
    parser.add_argument(
        "--identity", type=Path, metavar="FILE", help="key that keeps the relay's peer id; made if absent"
    )
    parser.add_argument(
        "--max-data",
        type=options.size,
        metavar="SIZE",
        help="of one circuit in each direction, after which it ends (default: 4GiB)",
    )
    parser.add_argument(
        "--max-time", type=options.positive_int, metavar="SECONDS", help="of one circuit (default: 1800)"
    )
    parser.add_argument(
        "--max-circuits", type=options.positive_int, metavar="N", help="open at a time for each peer (default: 16)"
    )
    parser.add_argument(
        "--max-peers", type=options.positive_int, metavar="N", help="reached through this relay (default: 128)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per start instead of text")


def run(args: argparse.Namespace) -> int:
    from geopetals.client.runtime import new_event_loop
    from geopetals.join_token import JoinToken
    from geopetals.progress import Console
    from geopetals.swarm.network import NetworkConfig, load_identity
    from geopetals.swarm.p2pd_options import RelayLimits
    from geopetals.swarm.relay import Relay

    token = JoinToken.decode(args.join) if args.join else None
    peers = token.peers if token is not None else tuple(args.initial_peers or ())
    limits = {
        "data_bytes": args.max_data,
        "seconds": args.max_time,
        "circuits_per_peer": args.max_circuits,
        "peers": args.max_peers,
    }
    config = NetworkConfig(
        initial_peers=peers,
        host=args.host,
        port=args.port,
        public_ip=args.public_ip,
        identity=load_identity(args.identity) if args.identity else None,
        relay_limits=RelayLimits(**{name: value for name, value in limits.items() if value is not None}),
    )
    reporter = Console()
    relay = Relay(config, reporter, _tell_json if args.json else _tell, token=token)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_run(relay))
    reporter.line("stopped")
    return 0


async def _run(relay: "Relay") -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await relay.run(stop)


def _tell(ready: "ReadyRelay") -> None:
    limits = ready.limits
    lines = [
        f"relaying: {in_units(limits.data_bytes)} in each direction and {limits.seconds} s of a circuit, "
        f"{limits.circuits_per_peer} circuits of each peer, {limits.peers} peers",
        f"peer {ready.peer_id}",
        "for servers behind NAT that are not told by the swarm:",
        f"  geopetals serve --relays {' '.join(ready.addresses)}",
    ]
    print("\n".join(lines), flush=True)


def _tell_json(ready: "ReadyRelay") -> None:
    print(json.dumps(asdict(ready)), flush=True)
