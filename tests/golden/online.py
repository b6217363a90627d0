"""Cases online_*: requests arrive one after another at one client, in the paper's accounting.

They run through the simulator, whose policies place, route and wait.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from geopetals.errors import MemoryShortage
from geopetals.placement.cg_bp import CgBp, cg_bp
from geopetals.placement.load import design_load, largest_load, lone_session_s
from geopetals.placement.petals import cache_slots
from geopetals.plan import Placement, Route
from geopetals.problem import Floats, Ints
from geopetals.routing.petals import sessions_on
from geopetals.routing.state import RouterState
from geopetals.simulation.engine import Course
from geopetals.simulation.policies import Constants, Desk, Planned, Router, Rules, Stock
from geopetals.simulation.result import Fate, Result
from geopetals.simulation.runs import run_course
from geopetals.simulation.sessions import Sessions
from geopetals.simulation.world import StockFacts, World
from tests.golden.compare import close, from_one, names, same, same_placement
from tests.golden.inputs import MS, Inputs


@dataclass
class Recorder:
    """A router that notes what the result of a simulation does not have."""

    router: Router
    state: RouterState
    capacity: Ints | None
    raw_waits_s: list[float] = field(default_factory=list)
    costs_s: list[float] = field(default_factory=list)
    oversubscribed_hops: int = 0

    def route(self, client: int, now: float, *, slots_per_block: int = 1) -> Route:
        route = self.router.route(client, now, slots_per_block=slots_per_block)
        if self.capacity is not None:
            over = sessions_on(self.state, now) > self.capacity
            self.oversubscribed_hops += int(over[list(route.chain.servers)].sum())
        raw_s = max(self.state.free_from_s(hop.server, hop.blocks, now) for hop in route.chain)
        self.raw_waits_s.append(max(raw_s - now, 0.0))
        self.costs_s.append(route.cost_s)
        return route


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
        policy, world = Planned(published=True, sessions=expected["R_used"]), _world(inputs)
        placement = policy.place(world, 0)
        desk = policy.desk(world, inputs.capped, placement, _rules(inputs))
        yield from _check_trace("ws_rr", inputs, placement, desk, expected["ws_rr"])
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
    order, sessions = tuple(inputs.join_order), None if plan is None else plan.sessions
    policies = {
        "petals": Stock(order=order),
        "petals_optimized_routing": Stock(order=order, planned_routing=True),
        "petals_optimized_order": Stock(order=order, planned_order=True, sessions=sessions),
        "petals_optimized_number": Stock(order=order, planned_number=True, sessions=sessions),
    }
    if comparable.get("petals_placement") and "a" in expected["petals"]:
        yield from same_placement("petals", policies["petals"].place(_world(inputs), 0), expected["petals"])
    for name, policy in policies.items():
        needs_plan = policy.planned_order or policy.planned_number
        if comparable.get(name) and not (needs_plan and plan is None):
            yield from _check_stock(name, inputs, policy, expected)


def _settle(slots: Ints, exact: Floats, expected: dict[str, Any]) -> Ints:
    """Where the quotient is a whole number but for its last bits, either side of it is right: take the expected one."""
    if "cache_slots" not in expected.get("petals", {}):
        return slots
    tied = np.abs(exact - np.round(exact)) <= 1e-9 * exact
    return np.where(tied, expected["petals"]["cache_slots"], slots)


def _check_stock(name: str, inputs: Inputs, policy: Stock, expected: dict[str, Any]) -> Iterator[str]:
    answer, world, problem = expected[name], _world(inputs), inputs.capped
    policy = replace(
        policy,
        hop_overhead_s=inputs.seconds("petals_hop_overhead_ms"),
        full_penalty_s=inputs.seconds("petals_full_penalty_ms"),
    )
    placement = policy.place(world, 0)
    if "a" in answer:
        yield from same_placement(name, placement, answer)
    capacity = policy.capacity(world, problem, placement)
    yield from same(f"{name}.session_capacity", capacity.tolist(), answer.get("session_capacity", capacity.tolist()))
    rules, held = _rules(inputs), placement.held
    if policy.planned_number:
        desk = policy.desk(world, problem, placement, rules)
    else:
        slots = cache_slots(problem, inputs.petals, held)
        slots = _settle(slots, held * (inputs.petals.cache_bytes / problem.kv_bytes), expected)
        desk = policy.desk_with(world, problem, placement, rules, slots)
    counted = None if policy.planned_routing else capacity
    yield from _check_trace(name, inputs, placement, desk, answer, capacity=counted)


def _world(inputs: Inputs) -> World:
    return World(problem=inputs.capped, stock=StockFacts(servers=inputs.petals, pings=inputs.pings))


def _rules(inputs: Inputs) -> Rules:
    constants = Constants(
        initial_s=inputs.seconds("initial_delay_ms"),
        petals_s=inputs.seconds("allocation_delay_petals_ms"),
        planned_s=inputs.seconds("allocation_delay_proposed_ms"),
    )
    return Rules(paper=True, constants=constants)


def _run(inputs: Inputs, placement: Placement, desk: Desk) -> Result:
    arrival_s = np.cumsum(np.array(inputs.raw["interarrival_ms"]) * MS)
    sessions = Sessions(client=np.zeros(arrival_s.size, dtype=np.int64), arrival_s=arrival_s)
    course = Course(world=_world(inputs), problem=inputs.capped, sessions=sessions)
    return run_course(course, desk, placement, policy_name="golden")


def _check_trace(
    name: str,
    inputs: Inputs,
    placement: Placement,
    desk: Desk,
    expected: dict[str, Any],
    *,
    capacity: Ints | None = None,
) -> Iterator[str]:
    recorder = Recorder(router=desk.router, state=desk.state, capacity=capacity)
    slots = [ledger.slots for ledger in desk.state.ledgers]
    result = _run(inputs, placement, replace(desk, router=recorder))
    if "error" in expected:
        if not (result.log.fate == Fate.REFUSED).all():
            yield f"{name}: found routes, expected {expected['error']!r}"
        return
    yield from same(f"{name}.cache_slots", slots, expected.get("cache_slots", slots))
    log = result.log
    yield from same(f"{name}.fate", log.fate.tolist(), [Fate.COMPLETED] * len(log.chains))
    yield from same(f"{name}.chains", names([chain for chain in log.chains if chain]), expected["chains"])
    series = {
        "arrival_ms": log.arrival_s,
        "raw_wait_ms": np.array(recorder.raw_waits_s),
        "wait_ms": log.wait_s,
        "total_ms": log.end_s - log.arrival_s,
        "ttft_ms": log.first_s - log.arrival_s,
        "completion_ms": log.end_s,
    }
    for key, values in series.items():
        yield from close(f"{name}.{key}", (values / MS).tolist(), expected[key])
    sums = {
        "sum_total_ms": float(series["total_ms"].sum()),
        "avg_ttft_ms": float(series["ttft_ms"].mean()),
        "avg_wait_ms": float(series["wait_ms"].mean()),
    }
    for key, value in sums.items():
        yield from close(f"{name}.{key}", value / MS, expected.get(key, value / MS))
    if "objective_ms" in expected:
        yield from close(f"{name}.objective_ms", [cost_s / MS for cost_s in recorder.costs_s], expected["objective_ms"])
    yield from same(
        f"{name}.max_concurrent", result.max_concurrent, expected.get("max_concurrent", result.max_concurrent)
    )
    if capacity is not None:
        yield from same(
            f"{name}.hops_on_oversubscribed_servers",
            recorder.oversubscribed_hops,
            expected["hops_on_oversubscribed_servers"],
        )
