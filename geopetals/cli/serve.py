"""`geopetals serve`: one block server on this machine."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from geopetals.cli import options
from geopetals.errors import NetworkError, UnsupportedInput

if TYPE_CHECKING:
    from geopetals.swarm.emulation import DeviceSpec

HELP = "serve some blocks of a model to a swarm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="Hub id or local directory; default: the model of the token")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--join", type=options.join_token, metavar="TOKEN", help="join the swarm that this token is from"
    )
    where.add_argument(
        "--initial-peers", "--initial_peers", nargs="+", metavar="ADDRESS", help="libp2p addresses instead of a token"
    )
    where.add_argument(
        "--new-swarm", "--new_swarm", action="store_true", help="start a swarm (the default without --join)"
    )
    parser.add_argument("--dht-prefix", "--dht_prefix", help="the swarm's name (default: the token's, or the model's)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--blocks",
        "--block_indices",
        type=options.span,
        metavar="START:END",
        help="these and no others (default: as the coordinator says; without one, those the swarm serves least)",
    )
    which.add_argument(
        "--max-blocks",
        "--num-blocks",
        "--num_blocks",
        dest="max_blocks",
        type=options.positive_int,
        metavar="N",
        help="so many at most (default: all that fit)",
    )
    add_resource_arguments(parser)
    parser.add_argument(
        "--host", help="address to listen on (default: all if the token's coordinator is elsewhere, else loopback)"
    )
    parser.add_argument(
        "--nat",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether this machine stands behind NAT and is to be reached through relays (default: find out)",
    )
    parser.add_argument(
        "--relays", nargs="+", metavar="ADDRESS", help="relays to use behind NAT (default: those of the swarm)"
    )
    parser.add_argument("--port", type=options.port, default=0, help="TCP port (default: a free one)")
    parser.add_argument("--public-ip", metavar="IP", help="address to announce, where --host is not what others see")
    parser.add_argument("--name", "--public_name", help="name to show to others")
    parser.add_argument(
        "--reprofile", action="store_true", help="measure anew how fast this machine is, for the coordinator"
    )
    parser.add_argument(
        "--metrics-port",
        type=options.port,
        metavar="PORT",
        help="serve Prometheus metrics on http://127.0.0.1:PORT/metrics (default: do not)",
    )
    parser.add_argument(
        "--identity", type=Path, metavar="FILE", help="key that keeps this server's peer id; made if absent"
    )


def add_resource_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument(
        "--device", type=options.device_name, help="cpu, cuda or cuda:N (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--dtype", type=options.dtype_name, help="float32, bfloat16 or float16 (default: float32 on a CPU)"
    )
    parser.add_argument(
        "--quantization", choices=("int8", "nf4"), help="hold the weights in 8 or 4 bits (bitsandbytes)"
    )
    parser.add_argument(
        "--memory",
        type=options.size,
        metavar="SIZE",
        help="limit for weights and attention cache, like 4GiB (default: 80%% of what is free)",
    )
    parser.add_argument(
        "--kv-cache-tokens",
        type=options.positive_int,
        metavar="N",
        help="tokens each block can hold (default: all that memory allows; without a coordinator 16384 with grouped "
        "heads, else 4096)",
    )
    parser.add_argument(
        "--emulate",
        metavar="DEVICE",
        help="for benchmarks: take this device's time, CLUSTER_FILE:SERVER or "
        "'weights=2ms,per_session=0.1ms,fixed=2ms,per_token=0.2ms,memory=4GB' (per block)",
    )
    parser.add_argument(
        "--dilation", type=float, default=1.0, metavar="K", help="with --emulate: all its times are K times as long"
    )


def emulated_device(args: argparse.Namespace) -> "DeviceSpec | None":
    from geopetals.bench.devices import read_device

    return read_device(args.emulate, dilation=args.dilation) if args.emulate else None


def run(args: argparse.Namespace) -> int:
    from geopetals.cli.serving import serve_until_signal
    from geopetals.join_token import JoinToken

    token = JoinToken.decode(args.join) if args.join else None
    model = args.model or (token.model if token is not None else None)
    if model is None:
        raise UnsupportedInput("say which model to serve, or give the token of a swarm with --join.")
    from geopetals.swarm.entering import default_host
    from geopetals.swarm.network import load_identity
    from geopetals.swarm.server_config import ServerConfig

    config = ServerConfig(
        model=model,
        token=token,
        initial_peers=tuple(args.initial_peers or ()),
        swarm=args.dht_prefix,
        blocks=args.blocks,
        count=args.max_blocks,
        host=args.host or default_host(token),
        port=args.port,
        public_ip=args.public_ip,
        name=args.name,
        identity=load_identity(args.identity) if args.identity else None,
        revision=args.revision,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        memory_bytes=args.memory,
        kv_cache_tokens=args.kv_cache_tokens,
        emulate=emulated_device(args),
        nat=args.nat,
        relays=_relays(args.relays),
        reprofile=args.reprofile,
    )
    if args.metrics_port is not None:
        _serve_metrics(args.metrics_port)
    return serve_until_signal(config, args.model or model)


def _relays(words: list[str] | None) -> tuple[str, ...]:
    if not words or words == ["auto"]:
        return ()
    for word in words:
        if not word.startswith("/") or "/p2p/" not in word or "," in word:
            raise UnsupportedInput(f"{word!r} is no relay's address: write /ip4/1.2.3.4/tcp/31331/p2p/<peer id>.")
    return tuple(words)


def _serve_metrics(port: int) -> None:
    from geopetals import metrics

    try:
        metrics.serve(port)
    except OSError as error:
        raise NetworkError(
            f"cannot listen on port {port} ({error.strerror}): choose another --metrics-port."
        ) from error
