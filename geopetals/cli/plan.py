"""`geopetals plan`: which server would hold which blocks of a cluster, and how long people would wait for tokens."""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from geopetals.cli import live_plan, options
from geopetals.errors import UnsupportedInput
from geopetals.units import in_units

if TYPE_CHECKING:
    from geopetals.cluster import Cluster
    from geopetals.planning import ClientReport, PetalsReport, PlanReport
    from geopetals.planning.service import ServiceLevel

HELP = "plan a cluster from a file: which server holds which blocks, and what its clients may expect"
METHODS = ("search", "cg_bp", "exact", "petals", "gsa")
_COSTED = ("search", "exact")
"""Those whose cost at once is known, so that a bound says something about it."""
OBJECTIVES = ("relay", "push")
_NAMES = {
    "search": "Search",
    "cg_bp": "CG-BP",
    "exact": "Exact placement",
    "petals": "PETALS' rule, servers joining in the file's order",
    "gsa": "GSA",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `geopetals plan`."""
    parser.add_argument(
        "cluster", metavar="CLUSTER", nargs="?", help="a cluster in YAML or JSON; docs/cluster.md describes it"
    )
    live_plan.add_arguments(parser)
    parser.add_argument("--method", choices=METHODS, default="search", help="how blocks are placed (default: search)")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="relay",
        help="how hidden states travel: by way of the client, as in stock PETALS, or from server to server "
        "(default: relay)",
    )
    parser.add_argument(
        "--budget",
        metavar="SECONDS",
        type=options.seconds,
        help="how long to search, on which the result then depends (default: a fixed number of steps, well under a "
        "second for 20 servers); for exact, how long to solve (default: 60)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=options.seed, default=0, help="of the random choices of search (default: 0)"
    )
    parser.add_argument(
        "--bound",
        action="store_true",
        help="look for a lower bound of what sessions cost at once, and print the gap (search and exact); takes "
        "seconds to minutes",
    )
    _add_slo(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, in seconds and bytes")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the plan into a .png, .svg or .pdf file")


def _add_slo(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "service level", "print the highest rate of arrivals at which a percentile of the sessions stays under limits"
    )
    group.add_argument("--slo-ttft", metavar="SECONDS", type=options.seconds, help="the limit of the TTFT")
    group.add_argument("--slo-tpot", metavar="SECONDS", type=options.seconds, help="the limit of the TPOT")
    group.add_argument(
        "--percentile", metavar="P", type=options.percentile, default=90.0, help="of all sessions (default: 90)"
    )
    group.add_argument(
        "--arrivals",
        metavar="N",
        type=options.positive_int,
        help="simulate N arrivals at each rate (default: route the sessions that are in progress at once)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan, once all of it is known."""
    if args.live:
        return live_plan.run(args)
    live_plan.check_unused(args)
    if args.cluster is None:
        raise UnsupportedInput("say which cluster to plan: a file, or --live for the plan of a running coordinator.")
    if args.bound and args.method not in _COSTED:
        raise UnsupportedInput(
            f"--bound is for placements by cost, {args.method} is none: use --method search or exact."
        )
    from geopetals.cluster_io import load_cluster
    from geopetals.planning import figure, plan, report_json
    from geopetals.planning.methods import Budget
    from geopetals.planning.service import service_json

    if args.plot is not None:
        figure.check(args.plot)
    cluster = load_cluster(args.cluster)
    budget = Budget(seconds=args.budget, clock=time.monotonic, seed=args.seed)
    report = plan(cluster, method=args.method, objective=args.objective, budget=budget, bound=args.bound)
    service = _service_level(cluster, args)
    if args.plot is not None:
        figure.draw(report, args.plot)
    if args.json:
        found = report_json(report) | ({} if service is None else {"service_level": service_json(service)})
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print("\n".join([*_lines(report), *([] if service is None else _service_lines(service))]))
    return 0


def _service_level(cluster: "Cluster", args: argparse.Namespace) -> "ServiceLevel | None":
    if args.slo_ttft is None and args.slo_tpot is None:
        return None
    from geopetals.planning.service import service_level
    from geopetals.planning.slo import Limits

    limits = Limits(
        ttft_s=args.slo_ttft or float("inf"), tpot_s=args.slo_tpot or float("inf"), percentile=args.percentile
    )
    return service_level(cluster, limits, objective=args.objective, seed=args.seed, arrivals=args.arrivals)


def _service_lines(service: "ServiceLevel") -> Iterator[str]:
    limits, found = service.limits, service.found
    asked = [
        f"{name} {_time(limit_s)}"
        for name, limit_s in (("TTFT", limits.ttft_s), ("TPOT", limits.tpot_s))
        if limit_s < float("inf")
    ]
    yield ""
    wanted = f"p{limits.percentile:g} within {' and '.join(asked)}"
    if found is None:
        yield f"Service level: {wanted} cannot be kept at any rate."
        return
    yield (
        f"Service level: {wanted} up to {found.rate_per_s * 60:.3g}/min, {_sessions(found.sessions)} at once "
        f"(TTFT {_time(found.ttft_s)}, TPOT {_time(found.tpot_s)}), with the blocks placed for that rate."
    )


def _lines(report: "PlanReport") -> Iterator[str]:
    yield from _head(report)
    yield ""
    yield from _table(
        ("server", "blocks", "weights", "cache", "sessions", "carries", "PETALS"), _server_rows(report), left={0}
    )
    yield ""
    yield from _table(
        ("client", "chain", "TTFT", "TPOT", "bound", "efficiency", "loaded: TTFT", "TPOT", "PETALS: TPOT"),
        _client_rows(report),
        left={0, 1},
    )
    yield ""
    yield from _notes(report)


def _head(report: "PlanReport") -> Iterator[str]:
    model, work = report.cluster.model, report.cluster.workload
    name, rate = report.cluster.name or "cluster", sum(report.cluster.demand_per_s()) * 60
    yield (
        f"{name}: {model.name}, {model.num_blocks} blocks of {in_units(model.block_bytes)}; "
        f"sessions of {work.prompt_tokens} + {work.output_tokens} tokens, {rate:.3g}/min"
    )
    way = "through the client" if report.objective == "relay" else "from server to server"
    yield f"{_NAMES[report.method]} for {_sessions(report.sessions)} at once, hidden states {way} ({report.objective})"


def _server_rows(report: "PlanReport") -> Iterator[Sequence[str]]:
    stock = report.petals.blocks or (None,) * len(report.servers)
    for server, beside in zip(report.servers, stock, strict=True):
        marks = ("~" if server.times_estimated else "") + ("*" if server.relayed else "")
        held = server.blocks is not None
        yield (
            f"{server.server} {marks}".rstrip(),
            str(server.blocks) if held else "-",
            in_units(server.weight_bytes) if held else "-",
            in_units(server.cache_bytes) if held else "-",
            str(server.sessions) if held else "-",
            str(server.carries) if held else "-",
            str(beside or "-"),
        )


def _client_rows(report: "PlanReport") -> Iterator[Sequence[str]]:
    stock = report.petals.client_tpot_s or (None,) * len(report.clients)
    for client, beside_s in zip(report.clients, stock, strict=True):
        yield (*_client_row(client), "-" if beside_s is None else _time(beside_s))


def _client_row(client: "ClientReport") -> Sequence[str]:
    loaded = client.together
    return (
        client.client,
        " > ".join(f"{hop.server} {hop.blocks}" for hop in client.chain),
        _time(client.alone.ttft_s),
        _time(client.alone.tpot_s),
        _time(client.bound.decode_s),
        f"{client.efficiency:.0%}",
        "-" if loaded is None else _time(loaded.ttft_s),
        "-" if loaded is None else _time(loaded.tpot_s),
    )


def _notes(report: "PlanReport") -> Iterator[str]:
    yield f"Loaded: {_sessions(report.sessions)} at once, waiting for cache included."
    if report.guarantee_s is not None:
        yield f"CG-BP guarantees a TPOT of {_time(report.guarantee_s)} or less to each of them, compute not contended."
    yield from _cost_notes(report)
    methods = ", ".join(sorted({client.bound.method for client in report.clients}))
    yield f"Bound: what no placement can beat for a session alone, without software overhead ({methods})."
    if any(server.times_estimated for server in report.servers):
        yield "~ block times are estimated from the type of GPU, not measured."
    if any(server.relayed for server in report.servers):
        yield "* reached through a relay."
    yield from _petals(report.petals, report)


def _cost_notes(report: "PlanReport") -> Iterator[str]:
    if report.mean_cost_s is None:
        return
    line = f"All at once, a session takes {_time(report.mean_cost_s)} in the mean"
    if report.cg_bp_cost_s is not None:
        line += f", with CG-BP {_time(report.cg_bp_cost_s)}"
    elif report.method == "search":
        line += "; CG-BP cannot place that many"
    yield f"{line}; caches reserved, nobody waits."
    if report.gap is not None:
        bound = _time(report.cost_bound_s or 0)
        yield f"No placement can bring that below {bound}: the gap is {report.gap:.1%} at most."


def _petals(petals: "PetalsReport", report: "PlanReport") -> Iterator[str]:
    yield ""
    if petals.median_tpot_s is None or petals.best_tpot_s is None or petals.worst_tpot_s is None:
        yield f"PETALS' rule serves no session in any of {petals.orders} random orders of joining."
        return
    yield (
        f"PETALS' rule, {petals.orders - petals.failed} random orders of joining: a session alone has a TPOT of "
        f"{_time(petals.median_tpot_s)} in the median ({_time(petals.best_tpot_s)} to {_time(petals.worst_tpot_s)}), "
        f"with this plan {_time(report.mean_tpot_s)}."
    )
    if petals.failed:
        yield f"{petals.failed} other orders serve no session."
    if petals.mean_session_s is not None:
        yield (
            f"With {_sessions(report.sessions)} at once, a whole session takes {_time(petals.mean_session_s)} in the "
            f"median order (its columns are above), with this plan {_time(report.mean_session_s)}."
        )


def _sessions(count: int) -> str:
    return "1 session" if count == 1 else f"{count} sessions"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]], *, left: set[int]) -> Iterator[str]:
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = (f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(line))
        yield "  ".join(cells).rstrip()
