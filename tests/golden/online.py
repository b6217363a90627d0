"""Cases online_*: requests arrive one after another at one client, in the paper's accounting."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from geopetals.errors import MemoryShortage, SwarmFailure
from geopetals.placement.cg_bp import CgBp, cg_bp
from geopetals.placement.load import design_load, largest_load, lone_session_s
from geopetals.placement.petals import blocks_to_hold, cache_slots, petals_placement
from geopetals.plan import Placement, Reservation, Route
from geopetals.problem import Floats, Ints
from geopetals.routing.backoff import paper_accounting
from geopetals.routing.petals import LeastWaitRouter, PetalsRouter, Router, sessions_on
from geopetals.routing.state import RouterState
from geopetals.timing import prefill_costs
from tests.golden.compare import close, from_one, names, same, same_placement
from tests.golden.inputs import MS, Inputs


@dataclass
class Trace:
    """What became of every request."""

    routes: list[Route] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    raw_waits_s: list[float] = field(default_factory=list)
    max_concurrent: int = 0
    oversubscribed_hops: int = 0


def check(inputs: Inputs, expected: dict[str, Any], comparable: dict[str, bool]) -> Iterator[str]:
    """The differences."""
    if "error" in expected:
        yield from _check_error(inputs, expected["error"])
        return
    plan = None
    if comparable.get("cg_bp"):
        yield from _check_load(inputs, expected)
        plan = cg_bp(inputs.capped, expected["R_used"])
        yield from check_cg_bp("cg_bp", plan, expected["cg_bp"])
    if comparable.get("ws_rr") and plan is not None:
        state = _state(inputs, plan.placement, inputs.capped.slots(plan.placement.held), "proposed")
        yield from _check_trace("ws_rr", inputs, state, state, expected["ws_rr"])
    yield from _check_petals(inputs, expected, comparable, plan)


def check_cg_bp(name: str, plan: CgBp, expected: dict[str, Any]) -> Iterator[str]:
    """Placement, order, and where given K and the guarantee."""
    yield from same_placement(name, plan.placement, expected)
    yield from same(f"{name}.order", from_one(plan.order), list(expected["order"]))
    if "K" in expected:
        yield from same(f"{name}.K", plan.servers_used, expected["K"])
        assert plan.bound_s is not None
        yield from close(f"{name}.bound_ms", plan.bound_s / MS, expected["bound_ms"])


def _check_error(inputs: Inputs, error: str) -> Iterator[str]:
    try:
        sessions = inputs.raw["R_given"] or design_load(inputs.problem, initial_s=inputs.seconds("initial_delay_ms"))
        cg_bp(inputs.capped, sessions)
    except MemoryShortage:
        return
    yield f"cg_bp: found a placement, expected {error!r}"


def _check_load(inputs: Inputs, expected: dict[str, Any]) -> Iterator[str]:
    initial_s = inputs.seconds("initial_delay_ms")
    extended = {"a": expected["bprr_extended_a"], "m": expected["bprr_extended_m"]}
    yield from same_placement("bprr_extended", cg_bp(inputs.problem, 1).placement, extended)
    yield from same("R_max", largest_load(inputs.problem), expected["R_max"])
    yield from close(
        "time_per_request_ms", lone_session_s(inputs.problem, initial_s=initial_s) / MS, expected["time_per_request_ms"]
    )
    yield from same("R_heuristic", design_load(inputs.problem, initial_s=initial_s), expected["R_heuristic"])
    yield from same("R_used", inputs.raw["R_given"] or expected["R_heuristic"], expected["R_used"])


def _check_petals(
    inputs: Inputs, expected: dict[str, Any], comparable: dict[str, bool], plan: CgBp | None
) -> Iterator[str]:
    problem, servers = inputs.capped, inputs.petals
    held = blocks_to_hold(problem, servers)
    rps = servers.announced_rps(held)
    slots = _settle(cache_slots(problem, servers, held), held * (servers.cache_bytes / problem.kv_bytes), expected)
    capacity = np.full(held.size, int(servers.cache_bytes // problem.kv_bytes))
    stock = petals_placement(problem, held, rps, inputs.join_order)
    if comparable.get("petals_placement") and "a" in expected["petals"]:
        yield from same_placement("petals", stock, expected["petals"])
    if comparable.get("petals"):
        yield from _check_stock("petals", inputs, stock, slots, capacity, expected)
    if comparable.get("petals_optimized_routing"):
        state = _state(inputs, stock, slots, "petals")
        yield from _check_trace(
            "petals_optimized_routing",
            inputs,
            state,
            LeastWaitRouter(state),
            expected["petals_optimized_routing"],
        )
    if plan is None:
        return
    if comparable.get("petals_optimized_order"):
        placement = petals_placement(problem, held, rps, plan.order)
        yield from _check_stock("petals_optimized_order", inputs, placement, slots, capacity, expected)
    if comparable.get("petals_optimized_number"):
        held = plan.placement.held
        placement = petals_placement(problem, held, servers.announced_rps(held), inputs.join_order)
        slots = problem.slots(held)
        yield from _check_stock(
            "petals_optimized_number", inputs, placement, slots, slots // np.maximum(held, 1), expected
        )


def _settle(slots: Ints, exact: Floats, expected: dict[str, Any]) -> Ints:
    """Where the quotient is a whole number but for its last bits, either side of it is right: take the expected one."""
    if "cache_slots" not in expected.get("petals", {}):
        return slots
    tied = np.abs(exact - np.round(exact)) <= 1e-9 * exact
    return np.where(tied, expected["petals"]["cache_slots"], slots)


def _check_stock(
    name: str, inputs: Inputs, placement: Placement, slots: Ints, capacity: Ints, expected: dict[str, Any]
) -> Iterator[str]:
    answer = expected[name]
    if "a" in answer:
        yield from same_placement(name, placement, answer)
    yield from same(f"{name}.session_capacity", capacity.tolist(), answer.get("session_capacity", capacity.tolist()))
    state = _state(inputs, placement, slots, "petals")
    router = PetalsRouter(
        state,
        inputs.pings,
        session_capacity=capacity,
        hop_overhead_s=inputs.seconds("petals_hop_overhead_ms"),
        full_penalty_s=inputs.seconds("petals_full_penalty_ms"),
    )
    yield from _check_trace(name, inputs, state, router, answer, capacity=capacity)


def _state(inputs: Inputs, placement: Placement, slots: Ints, method: str) -> RouterState:
    constant_s = inputs.seconds("initial_delay_ms") + inputs.seconds(f"allocation_delay_{method}_ms")
    return RouterState(inputs.capped, placement, slots=slots, accounting=paper_accounting(constant_s))


def _run(state: RouterState, router: Router | RouterState, gaps_ms: Sequence[float], capacity: Ints | None) -> Trace:
    trace, now = Trace(), 0.0
    running: list[tuple[float, int, Reservation]] = []
    for gap_ms in gaps_ms:
        now += gap_ms * MS
        while running and running[0][0] <= now:
            state.close(heapq.heappop(running)[2], now)
        route = router.route(0, now)
        if capacity is not None:
            over = sessions_on(state, now) > capacity
            trace.oversubscribed_hops += int(over[list(route.chain.servers)].sum())
        raw_s = max(state.free_from_s(hop.server, hop.blocks, now) for hop in route.chain)
        trace.raw_waits_s.append(max(raw_s - now, 0.0))
        reservation = state.open(route, now)
        heapq.heappush(running, (reservation.end_s, reservation.number, reservation))
        trace.routes.append(route)
        trace.arrivals_s.append(now)
        trace.max_concurrent = max(trace.max_concurrent, len(running))
    return trace


def _check_no_route(
    name: str, inputs: Inputs, state: RouterState, router: Router | RouterState, error: str
) -> Iterator[str]:
    try:
        _run(state, router, inputs.raw["interarrival_ms"], None)
    except SwarmFailure:
        return
    yield f"{name}: found routes, expected {error!r}"


def _check_trace(
    name: str,
    inputs: Inputs,
    state: RouterState,
    router: Router | RouterState,
    expected: dict[str, Any],
    *,
    capacity: Ints | None = None,
) -> Iterator[str]:
    if "error" in expected:
        yield from _check_no_route(name, inputs, state, router, expected["error"])
        return
    slots = [ledger.slots for ledger in state.ledgers]
    yield from same(f"{name}.cache_slots", slots, expected.get("cache_slots", slots))
    trace = _run(state, router, inputs.raw["interarrival_ms"], capacity)
    yield from same(f"{name}.chains", names([route.chain for route in trace.routes]), expected["chains"])
    prefill = prefill_costs(state.problem)
    constant_s = state.accounting.constant_s
    arrivals, routes = trace.arrivals_s, trace.routes
    series = {
        "arrival_ms": arrivals,
        "raw_wait_ms": trace.raw_waits_s,
        "wait_ms": [route.wait_s for route in routes],
        "total_ms": [route.end_s - now for route, now in zip(routes, arrivals, strict=True)],
        "ttft_ms": [route.wait_s + constant_s + prefill.chain_s(route.client, route.chain) for route in routes],
        "completion_ms": [route.end_s for route in routes],
    }
    for key, values in series.items():
        yield from close(f"{name}.{key}", np.array(values) / MS, expected[key])
    sums = {
        "sum_total_ms": sum(series["total_ms"]),
        "avg_ttft_ms": float(np.mean(series["ttft_ms"])),
        "avg_wait_ms": float(np.mean(series["wait_ms"])),
    }
    for key, value in sums.items():
        yield from close(f"{name}.{key}", value / MS, expected.get(key, value / MS))
    if "objective_ms" in expected:
        yield from close(f"{name}.objective_ms", [r.cost_s / MS for r in routes], expected["objective_ms"])
    yield from same(
        f"{name}.max_concurrent", trace.max_concurrent, expected.get("max_concurrent", trace.max_concurrent)
    )
    if capacity is not None:
        yield from same(
            f"{name}.hops_on_oversubscribed_servers",
            trace.oversubscribed_hops,
            expected["hops_on_oversubscribed_servers"],
        )
