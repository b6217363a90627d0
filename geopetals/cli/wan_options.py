"""Options of `geopetals wan`, and the network that those of `up` describe."""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from geopetals.errors import GeoPetalsError, UnsupportedInput

if TYPE_CHECKING:
    from geopetals.wan.spec import WanSpec

NONE = "none"


def add_up(parser: argparse.ArgumentParser) -> None:
    """Add the options of `geopetals wan up`."""
    parser.add_argument(
        "source",
        metavar="FILE",
        nargs="?",
        help="a cluster (docs/cluster.md), a .csv of RTTs, a .graph topology, or topohub:GROUP/NAME",
    )
    parser.add_argument("--hosts", metavar="A,B,...", help="hosts by name, all equally far, instead of a file")
    parser.add_argument("--rtt", metavar="RTT", type=duration, help="between them (default: 0 ms)")
    add_link_options(parser)
    parser.add_argument("--up", metavar="RATE", type=rate, help="of every host's line, or `none`")
    parser.add_argument("--down", metavar="RATE", type=rate, help="of every host's line, or `none`")
    parser.add_argument(
        "--nat",
        metavar="HOST=KIND",
        action="append",
        default=[],
        help="put a host behind a NAT: port-preserving (a peer can punch a hole) or symmetric; may be repeated",
    )
    parser.add_argument(
        "--dilation",
        metavar="K",
        type=float,
        default=1.0,
        help="multiply delays, divide bandwidths (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of jitter and losses (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_link_options(parser: argparse.ArgumentParser) -> None:
    """Add what links have beside their RTT."""
    parser.add_argument("--jitter", metavar="TIME", type=duration, help="mean of the random time added one way")
    parser.add_argument("--loss", metavar="SHARE", type=share, help="of the packets of each direction, such as 1%%")
    parser.add_argument("--bandwidth", metavar="RATE", type=rate, help="between a pair, each way, or `none`")


def duration(text: str) -> float:
    """`80ms` in seconds."""
    from geopetals.cluster.quantities import DURATION

    return _quantity(DURATION.parse, text)


def rate(text: str) -> float:
    """`20Mbit/s` in bits per second; 0 for `none`."""
    from geopetals.cluster.quantities import BANDWIDTH

    return 0.0 if text == NONE else _quantity(BANDWIDTH.parse, text)


def share(text: str) -> float:
    """`1%` or `0.01`."""
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,9})?)\s*(%?)\s*", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write a percentage such as 1%, or 0 to 1.")
    return value


def spec(args: argparse.Namespace) -> "WanSpec":
    """The network that the options of `up` describe. Raises UnsupportedInput, or WanError."""
    from geopetals.wan.spec import Nat

    found = _from_source(args)
    kinds = dict(_nat(text, found.names) for text in args.nat)
    hosts = tuple(
        dataclasses.replace(
            host,
            up_bit_per_s=host.up_bit_per_s if args.up is None else args.up or None,
            down_bit_per_s=host.down_bit_per_s if args.down is None else args.down or None,
            nat=Nat(kinds[host.name]) if host.name in kinds else None,
        )
        for host in found.hosts
    )
    links = {
        pair: dataclasses.replace(
            link,
            jitter_s=args.jitter or 0.0,
            loss=args.loss or 0.0,
            bandwidth_bit_per_s=args.bandwidth or None,
        )
        for pair, link in found.links.items()
    }
    return dataclasses.replace(found, hosts=hosts, links=links, dilation=args.dilation, seed=args.seed)


def _from_source(args: argparse.Namespace) -> "WanSpec":
    from geopetals.wan.spec import WanSpec

    if (args.source is None) == (args.hosts is None):
        raise UnsupportedInput("name the network's hosts: give a file, or --hosts A,B,...")
    if args.hosts is not None:
        return WanSpec.uniform([name.strip() for name in args.hosts.split(",")], rtt_s=args.rtt or 0.0)
    if args.rtt is not None:
        raise UnsupportedInput("the file says how far hosts are from each other: leave --rtt out, or give --hosts.")
    from geopetals.wan.sources import load_spec

    return load_spec(args.source)


def _nat(text: str, names: tuple[str, ...]) -> tuple[str, str]:
    from geopetals.wan.spec import Nat

    host, _, kind = text.rpartition("=")
    if host not in names or kind not in list(Nat):
        raise UnsupportedInput(f"--nat {text!r} is not HOST=KIND: name a host and one of {', '.join(Nat)}.")
    return host, kind


def _quantity(parse: Callable[[object], float], text: str) -> float:
    try:
        return parse(text)
    except GeoPetalsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
