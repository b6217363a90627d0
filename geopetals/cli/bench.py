"""`geopetals bench`: load on a swarm, ours or stock PETALS', in the terms of `vllm bench serve`."""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geopetals.cli import options
from geopetals.errors import UnsupportedInput

if TYPE_CHECKING:
    from geopetals.bench.run import RunRecord
    from geopetals.bench.systems import SystemUnderTest
    from geopetals.bench.workload import Load

HELP = "put load on a swarm and measure TTFT, TPOT, ITL, waits, failures and goodput"
_EPILOG = (
    "Exit code 0: a run that counts; 1: it failed, or is rejected by the rule (cores busy for more than 60 % of the "
    "time, or requests or packets late by more than 5 % of the median ITL at p99); 2: usage."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    _add_swarm(parser)
    _add_load(parser)
    _add_hosts(parser)
    result = parser.add_argument_group("result")
    result.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="ttft:500 tpot:100 e2el:9000: limits of a good one",
    )
    result.add_argument("--out", type=Path, metavar="FILE", help="write the whole result here, as JSON")
    result.add_argument("--details", action="store_true", help="with every request's times and tokens")
    result.add_argument("--json", action="store_true", help="print the whole result, as JSON")
    result.add_argument("--no-reject", action="store_true", help="exit with 0 though the rule rejects the run")


def _add_swarm(parser: argparse.ArgumentParser) -> None:
    swarm = parser.add_argument_group("swarm")
    where = swarm.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--join", type=options.join_token, metavar="TOKEN", help="the swarm's token, as `geopetals serve` prints it"
    )
    where.add_argument("--initial-peers", nargs="+", metavar="ADDRESS", help="libp2p addresses instead of a token")
    swarm.add_argument("--model", help="Hub id or local directory (default: the token's)")
    swarm.add_argument("--dht-prefix", help="the swarm's name, where it is not the model's")
    swarm.add_argument("--system", choices=("geopetals", "stock"), default="geopetals", help="whose client to drive")
    swarm.add_argument("--stock-python", type=Path, metavar="FILE", help="of stock PETALS (default: .venv-stock's)")


def _add_load(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    load.add_argument(
        "--num-prompts", type=options.positive_int, default=32, metavar="N", help="requests (default: 32)"
    )
    load.add_argument(
        "--request-rate", type=_rate, default=math.inf, metavar="R", help="per second, all hosts; default: inf, at once"
    )
    load.add_argument(
        "--burstiness", type=float, default=1.0, metavar="B", help="1 is Poisson (default), inf a constant rate"
    )
    load.add_argument("--trace", type=Path, metavar="CSV", help="arrivals and lengths of a trace instead, like Azure's")
    load.add_argument("--trace-speed", type=_rate, default=1.0, metavar="X", help="replay it X times as fast")
    load.add_argument("--input-len", default="32", metavar="LENGTH", help="128, 64-256 or 128~0.5:2048 (default: 32)")
    load.add_argument("--output-len", default="32", metavar="LENGTH", help="the same for answers (default: 32)")
    load.add_argument("--num-warmups", type=int, default=1, metavar="N", help="per host, not counted (default: 1)")
    load.add_argument("--seed", type=options.seed, default=0)
    load.add_argument(
        "--request-timeout", type=float, default=600.0, metavar="S", help="a request has failed then (default: 600)"
    )


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    hosts = parser.add_argument_group("hosts")
    hosts.add_argument(
        "--host",
        action="append",
        dest="hosts",
        metavar="NAME[=RATE]",
        help="clients here, with a rate of their own; may be repeated (default: one, this machine)",
    )
    hosts.add_argument(
        "--exec", metavar="COMMAND", help="start clients here by this, {host} in it is their host's name"
    )
    hosts.add_argument(
        "--wan",
        metavar="NAME|DIR",
        help="clients run in this emulated network (its --name or --state), lateness is judged",
    )
    hosts.add_argument(
        "--dilation",
        type=float,
        default=1.0,
        metavar="K",
        help="delays and devices are K times as slow: figures are not",
    )


def run(args: argparse.Namespace) -> int:
    from geopetals.bench import report
    from geopetals.bench.run import run_load
    from geopetals.progress import Console

    system, load, requests_of = _system(args), _load(args), _requests(args)
    wan = _Wan(args.wan) if args.wan else None
    record = run_load(
        [system.worker(host, _prefix(args, host)) for host in load.rates],
        lambda vocabulary: requests_of(load, vocabulary),
        dilation=_dilation(args),
        timeout_s=args.request_timeout,
        before=wan.reset if wan else lambda: None,
        after=wan.read if wan else lambda: None,
        reporter=Console(),
    )
    result = _result(args, system, load, record, wan)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else report.as_text(result))
    return 0 if result["verdict"]["accepted"] or args.no_reject else 1


def _result(
    args: argparse.Namespace, system: "SystemUnderTest", load: "Load", record: "RunRecord", wan: "_Wan | None"
) -> dict[str, Any]:
    from geopetals.bench import report
    from geopetals.bench.results import read_goodput

    return report.result(
        record,
        system=system,
        load=load,
        command=_command(args),
        seed=args.seed,
        dilation=args.dilation,
        goodput_ms=read_goodput(args.goodput),
        details=args.details,
        wan=wan.status if wan else None,
    )


class _Wan:
    """The emulated network of that name or directory, and how late it was in the measured part of the run."""

    def __init__(self, name: str) -> None:
        from geopetals.wan.state import named_directory

        self._directory = Path(name) if "/" in name else named_directory(name)
        self.status: dict[str, Any] = {}

    def reset(self) -> None:
        self._request("reset")

    def read(self) -> None:
        self.status = self._request("status")

    def _request(self, what: str) -> dict[str, Any]:
        from geopetals.wan import control

        answer: dict[str, Any] = control.request(self._directory, {"do": what})
        return answer


def _command(args: argparse.Namespace) -> str:
    """Without the token: whoever has it can join the swarm."""
    return shlex.join(["geopetals", *(word.replace(args.join or "\0", "TOKEN") for word in sys.argv[1:])])


def _system(args: argparse.Namespace) -> "SystemUnderTest":
    from geopetals.bench.results import read_goodput
    from geopetals.bench.systems import STOCK, STOCK_PYTHON, SystemUnderTest, require_stock
    from geopetals.join_token import JoinToken, swarm_name_for

    read_goodput(args.goodput)
    token = JoinToken.decode(args.join) if args.join else None
    model = args.model or (token.model if token else None)
    if model is None:
        raise UnsupportedInput("say which model: --model, where the swarm is not named by a token.")
    python = args.stock_python or STOCK_PYTHON
    if args.system == STOCK:
        require_stock(python)
    return SystemUnderTest(
        system=args.system,
        model=model,
        initial_peers=token.peers if token else tuple(args.initial_peers),
        swarm=args.dht_prefix or (token.swarm if token else swarm_name_for(model)),
        stock_python=python,
    )


def _load(args: argparse.Namespace) -> "Load":
    from geopetals.bench.lengths import read_length
    from geopetals.bench.workload import Load

    return Load(
        rates=_rates(args.hosts or ["local"], args.request_rate),
        requests=args.num_prompts,
        prompt_tokens=read_length(args.input_len),
        output_tokens=read_length(args.output_len),
        burstiness=args.burstiness,
        warmups=max(0, args.num_warmups),
    )


def _requests(args: argparse.Namespace) -> Any:
    from geopetals.bench.trace import read_trace
    from geopetals.bench.workload import draw, replay

    if args.trace is None:
        return lambda load, vocabulary: draw(load, vocabulary=vocabulary, seed=args.seed)
    rows = read_trace(args.trace, speed=args.trace_speed)
    return lambda load, vocabulary: replay(load, rows, vocabulary=vocabulary, seed=args.seed)


def _rates(hosts: list[str], total: float) -> dict[str, float]:
    named: dict[str, float | None] = {}
    for text in hosts:
        name, given, rate = text.partition("=")
        if not name or name in named:
            raise UnsupportedInput(f"{text!r}: give each host one name, as NAME or NAME=RATE.")
        try:
            named[name] = _rate(rate) if given else None
        except argparse.ArgumentTypeError as error:
            raise UnsupportedInput(f"--host {text}: {error}") from error
    return {name: total / len(named) if rate is None else rate for name, rate in named.items()}


def _prefix(args: argparse.Namespace, host: str) -> list[str]:
    if args.wan and args.exec:
        raise UnsupportedInput("--wan starts the clients in its network itself: leave --exec out.")
    if args.wan:
        which = "--state" if "/" in args.wan else "--name"
        return [sys.executable, "-m", "geopetals", "wan", "exec", which, args.wan, host, "--"]
    return [word.replace("{host}", host) for word in shlex.split(args.exec or "")]


def _dilation(args: argparse.Namespace) -> float:
    dilation = float(args.dilation)
    if not 0 < dilation <= 1000:
        raise UnsupportedInput(f"--dilation {dilation}: give a number above 0, up to 1000.")
    return dilation


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: write a number above 0, or inf.")
    return value
