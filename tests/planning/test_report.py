"""What `geopetals plan` says holds of the placement and the chains that it names."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from geopetals.cluster import Cluster, to_problem
from geopetals.cluster_io import load_cluster, parse_cluster
from geopetals.errors import GeoPetalsError, MemoryShortage, UnsupportedInput
from geopetals.planning import PlanReport, plan, report_json
from geopetals.planning.expected import shared_out
from geopetals.planning.methods import METHODS, Budget, Method, place
from geopetals.planning.stock import StockSwarm
from geopetals.timing import Objective

EXAMPLES = Path(__file__).parents[2] / "examples/clusters"
NAMES = ("home-gpus", "campus", "bloom-topology")
ONE_CLIENT = """
model: {name: small, blocks: 12, hidden_size: 64, block_memory: 1 GB, kv_per_token: 256 B, hidden_state: 128 B}
workload: {prompt_tokens: 10, output_tokens: 20, sessions: 4}
servers:
  - {name: slow, count: 6, place: far, memory: 4.5 GB, decode_block: 9 ms, prefill_block: 20 ms}
  - {name: fast, count: 3, place: near, memory: 8.5 GB, decode_block: 2 ms, prefill_block: 5 ms}
clients: [{name: me, place: near, requests: 1/min}]
network: {rtt: {near: {near: 4 ms, far: 80 ms}, far: {far: 6 ms}}}
"""


def example(name: str) -> Cluster:
    return load_cluster(EXAMPLES / f"{name}.yaml")


def one_client(old: str = "", new: str = "") -> Cluster:
    assert old in ONE_CLIENT
    return parse_cluster(ONE_CLIENT.replace(old, new, 1) if old else ONE_CLIENT, directory=EXAMPLES)


CASES: list[tuple[str, Method, Objective]] = [
    *(
        (name, method, objective)  # type: ignore[misc]
        for name in NAMES
        for method in ("search", "cg_bp")
        for objective in ("relay", "push")
    ),
    *((name, "petals", "relay") for name in NAMES),  # type: ignore[misc]
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def planned(request: pytest.FixtureRequest) -> PlanReport:
    name, method, objective = request.param
    return plan(example(name), method=method, objective=objective)


def test_every_chain_covers_the_model_with_blocks_that_its_servers_hold(planned: PlanReport) -> None:
    held = {server.server: server.blocks for server in planned.servers}
    for client in planned.clients:
        ends = [0]
        for hop in client.chain:
            span = held[hop.server]
            assert span is not None
            assert span.start <= hop.blocks.start == ends[-1]
            assert hop.blocks.end <= span.end
            ends.append(hop.blocks.end)
        assert ends[-1] == planned.cluster.model.num_blocks


def test_memory_is_split_into_weights_and_cache_for_the_sessions(planned: PlanReport) -> None:
    kv_bytes = to_problem(planned.cluster).kv_bytes
    for server, spec in zip(planned.servers, planned.cluster.servers, strict=True):
        if server.blocks is not None:
            assert server.weight_bytes + server.cache_bytes == spec.memory_bytes
            assert server.sessions * server.blocks.blocks * kv_bytes <= server.cache_bytes


def test_nobody_is_faster_than_the_bound(planned: PlanReport) -> None:
    for client in planned.clients:
        assert 0 < client.efficiency <= 1
        assert client.together is None or client.together.tpot_s >= client.alone.tpot_s - 1e-12
        assert client.alone.ttft_s > 0


def test_json_has_the_same_and_is_json(planned: PlanReport) -> None:
    read = json.loads(json.dumps(report_json(planned), allow_nan=False))
    assert read["mean_tpot_s"] == planned.mean_tpot_s
    assert [server["server"] for server in read["servers"]] == [server.server for server in planned.servers]
    assert read["clients"][0]["bound"]["tpot_s"] == planned.clients[0].bound.decode_s


@pytest.mark.parametrize("name", NAMES)
def test_sessions_planned_for_need_not_wait_and_keep_the_guarantee(name: str) -> None:
    report = plan(example(name), method="cg_bp")
    assert report.guarantee_s is not None
    for client in report.clients:
        assert client.alone.tpot_s <= report.guarantee_s + 1e-12
        assert client.together is None or client.together.wait_s == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", ["relay", "push"])
def test_search_is_no_dearer_than_cg_bp_and_not_below_the_bound(name: str, objective: Objective) -> None:
    report = plan(example(name), objective=objective, bound=True)
    assert report.method == "search"
    assert report.mean_cost_s is not None
    assert report.cg_bp_cost_s is None or report.mean_cost_s <= report.cg_bp_cost_s * (1 + 1e-9)
    assert report.cost_bound_s is not None
    assert report.cost_bound_s <= report.mean_cost_s * (1 + 1e-9)
    assert report.gap == pytest.approx(report.mean_cost_s / report.cost_bound_s - 1, abs=1e-9)
    assert all(client.together is not None and client.together.wait_s == 0 for client in report.clients)


def test_a_budget_of_time_and_a_seed_are_passed_on() -> None:
    ticks = iter(range(1_000))
    budget = Budget(seconds=5.0, clock=lambda: float(next(ticks)), seed=3)
    assert plan(one_client(), budget=budget).mean_cost_s is not None
    assert next(ticks) > 5


@pytest.mark.parametrize("name", NAMES)
def test_pushing_is_no_slower_than_relaying(name: str) -> None:
    assert plan(example(name), objective="push").mean_tpot_s <= plan(example(name)).mean_tpot_s


def test_the_same_cluster_gives_the_same_report() -> None:
    assert report_json(plan(example("campus"))) == report_json(plan(example("campus")))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_plans_for_one_client(method: Method) -> None:
    report = plan(one_client(), method=method)
    assert report.sessions == 4
    assert report.clients[0].alone.tpot_s > 0


def test_pinned_blocks_stay() -> None:
    report = plan(one_client("name: slow, count: 6,", "name: slow, count: 6, blocks: 5:8,"))
    assert all(str(server.blocks) == "5:8" for server in report.servers if server.server.startswith("slow"))


def test_petals_is_shown_where_no_order_of_joining_serves_anybody() -> None:
    """Two servers that only just hold the model: stock PETALS sets more memory aside, and they do not."""
    text = ONE_CLIENT.replace("count: 6, place: far, memory: 4.5 GB", "count: 2, place: far, memory: 6.2 GB")
    lines = [line for line in text.splitlines() if "name: fast" not in line]
    tight = "\n".join(lines).replace("sessions: 4", "sessions: 1")
    petals = plan(parse_cluster(tight.replace("hidden_size: 64", "hidden_size: 8192"), directory=EXAMPLES)).petals
    assert (petals.failed, petals.median_tpot_s, petals.blocks) == (petals.orders, None, None)


def test_what_a_method_cannot_do_is_one_sentence() -> None:
    refusals: list[tuple[Cluster, Method, Objective, type[GeoPetalsError], str]] = [
        (example("home-gpus"), "gsa", "relay", UnsupportedInput, "one client"),
        (example("campus"), "petals", "push", UnsupportedInput, "does not push"),
        (one_client("sessions: 4", "sessions: 900000"), "cg_bp", "relay", MemoryShortage, "900000"),
    ]
    for cluster, method, objective, error, words in refusals:
        with pytest.raises(error, match=words):
            plan(cluster, method=method, objective=objective)


def test_sessions_are_shared_out_by_demand() -> None:
    problem = to_problem(example("home-gpus"))
    counts = np.bincount(shared_out(problem, 70), minlength=3)
    assert counts.tolist() == [30, 30, 10]


def test_the_bound_is_of_the_sessions_that_were_planned_for() -> None:
    """The one who seldom asks has a session beside those of the one who does all the time, and is nearer."""
    seldom = "{name: often, place: far, requests: 60/min}, {name: seldom, place: near, requests: 0.01/min}"
    text = ONE_CLIENT.replace(", sessions: 4", "").replace("{name: me, place: near, requests: 1/min}", seldom)
    cluster = parse_cluster(text, directory=EXAMPLES)
    problem = to_problem(cluster)
    planned = place(cluster, problem, StockSwarm(cluster, problem), "search", "relay")
    assert planned.counts == (planned.sessions - 1, 1)
    report = plan(cluster, bound=True)
    assert report.mean_cost_s is not None
    assert report.cost_bound_s is not None
    assert report.cost_bound_s <= report.mean_cost_s * (1 + 1e-9)


def test_a_bound_above_the_cost_is_not_hidden() -> None:
    report = plan(one_client())
    assert replace(report, mean_cost_s=2.0, cost_bound_s=2.0 + 1e-9).gap == 0
    assert replace(report, mean_cost_s=2.0, cost_bound_s=4.0).gap == -0.5
