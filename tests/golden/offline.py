"""Cases offline_*, tiny_optimum and gsa: all requests come at time 0."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from geopetals.errors import MemoryShortage
from geopetals.placement.cg_bp import CgBp, cg_bp
from geopetals.placement.gsa import gsa, gsa_chains
from geopetals.placement.petals import blocks_to_hold, petals_placement
from geopetals.problem import Problem
from geopetals.routing.petals import PetalsRouter
from geopetals.routing.shortest import shortest_chain
from geopetals.routing.state import Accounting, RouterState
from geopetals.timing import HopCosts, session_costs, weighted_costs
from tests.golden.compare import RELATIVE, close, names, same, same_placement
from tests.golden.inputs import MS, Inputs
from tests.golden.online import check_cg_bp


def check(inputs: Inputs, expected: dict[str, Any], comparable: dict[str, bool]) -> Iterator[str]:
    """The differences."""
    if not comparable.get("placement"):
        return
    problem, sessions = inputs.problem, inputs.raw["R"]
    plan = cg_bp(problem, sessions)
    heuristic = expected["bprr_heuristic"]
    yield from check_cg_bp("bprr_heuristic", plan, heuristic)
    yield from _check_capped(inputs, expected["cg_bp"])
    costs = weighted_costs(problem, prefills=0, decodes=problem.output_tokens)
    yield from _check_chains(inputs, plan, costs, heuristic)
    extended = cg_bp(problem, sessions)
    yield from same_placement("bprr_extended", extended.placement, expected["bprr_extended"])
    total_s = _total_s(inputs, extended, session_costs(problem)) + sessions * inputs.seconds("initial_delay_ms")
    yield from close("bprr_extended.total_ms", total_s / MS, expected["bprr_extended"]["total_ms"])
    if "petals_offline" in expected:
        yield from _check_petals(inputs, expected["petals_offline"])
    if "optimum" in expected and heuristic["total_ms"] < expected["optimum"]["total_ms"] * (1 - RELATIVE):
        yield f"bprr_heuristic.total_ms: {heuristic['total_ms']} is below the optimum {expected['optimum']['total_ms']}"


def _check_capped(inputs: Inputs, expected: dict[str, Any]) -> Iterator[str]:
    try:
        plan = cg_bp(inputs.capped, inputs.raw["R"])
    except MemoryShortage as error:
        yield from () if "error" in expected else (f"cg_bp: {error}",)
        return
    if "error" in expected:
        yield f"cg_bp: found a placement, expected {expected['error']!r}"
        return
    yield from check_cg_bp("cg_bp", plan, expected)


def _total_s(inputs: Inputs, plan: CgBp, costs: HopCosts) -> float:
    each = inputs.raw["requests_per_client"]
    return sum(shortest_chain(plan.placement, costs, c)[0] * each for c in range(inputs.problem.num_clients))


def _check_chains(inputs: Inputs, plan: CgBp, costs: HopCosts, expected: dict[str, Any]) -> Iterator[str]:
    chains = [shortest_chain(plan.placement, costs, c)[1] for c in range(inputs.problem.num_clients)]
    yield from same("bprr_heuristic.chain_per_client", names(chains), expected["chain_per_client"])
    total_s = _total_s(inputs, plan, costs)
    yield from close("bprr_heuristic.total_ms", total_s / MS, expected["total_ms"])
    if "memory_aware_total_ms" in expected:
        state = RouterState(
            _decode_only(inputs.problem), plan.placement, accounting=Accounting(booked_from_arrival=True)
        )
        ends_s = [state.open(state.route(0, 0.0), 0.0).end_s for _ in range(inputs.raw["requests_per_client"])]
        yield from close("bprr_heuristic.memory_aware_total_ms", sum(ends_s) / MS, expected["memory_aware_total_ms"])


def _check_petals(inputs: Inputs, expected: dict[str, Any]) -> Iterator[str]:
    problem, servers = inputs.problem, inputs.petals
    held = blocks_to_hold(problem, servers)
    slots = problem.slots(held)
    placement = petals_placement(problem, held, servers.forward_rps, inputs.join_order)
    yield from same_placement("petals_offline", placement, expected)
    state = RouterState(
        _decode_only(problem),
        placement,
        slots=slots,
        accounting=Accounting(booked_from_arrival=True),
    )
    router = PetalsRouter(
        state,
        inputs.pings,
        session_capacity=slots // np.maximum(held, 1),
        hop_overhead_s=inputs.seconds("petals_hop_overhead_ms"),
        full_penalty_s=inputs.seconds("petals_full_penalty_ms"),
    )
    routes = []
    for client in range(problem.num_clients):
        for _ in range(inputs.raw["requests_per_client"]):
            routes.append(router.route(client, 0.0))
            state.open(routes[-1], 0.0)
    yield from same("petals_offline.chains", names([r.chain for r in routes]), expected["chains"])
    yield from close("petals_offline.start_ms", [r.start_s / MS for r in routes], expected["start_ms"])
    yield from close("petals_offline.finish_ms", [r.end_s / MS for r in routes], expected["finish_ms"])
    yield from close("petals_offline.total_ms", sum(r.end_s for r in routes) / MS, expected["total_ms"])


def _decode_only(problem: Problem) -> Problem:
    """The offline model: every token takes a decode step, the first one too."""
    fields = {name: getattr(problem, name) for name in Problem.__dataclass_fields__}
    fields |= {"relay_prefill_s": problem.relay_decode_s, "prefill_block_s": problem.decode_block_s}
    return Problem(**fields)


def check_gsa(inputs: Inputs, expected: dict[str, Any], comparable: bool) -> Iterator[str]:
    """Stages, chains and times of the special case with equally many blocks on all servers."""
    if not comparable:
        return
    problem, sessions = inputs.problem, inputs.raw["R"]
    plan = gsa(problem, sessions, blocks=inputs.raw["m"])
    yield from same("stage", (plan.stages + 1).tolist(), expected["stage"])
    yield from same_placement("gsa", plan.placement, expected)
    chains = gsa_chains(plan, sessions)
    yield from same("chains", names(chains), expected["chains"])
    costs = weighted_costs(problem, prefills=0, decodes=problem.output_tokens)
    finish_ms = [costs.chain_s(0, chain) / MS for chain in chains]
    yield from close("start_ms", np.zeros(sessions), expected["start_ms"])
    yield from close("finish_ms", finish_ms, expected["finish_ms"])
    yield from close("total_ms", sum(finish_ms), expected["total_ms"])
