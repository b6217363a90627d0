"""Widening the cutoff until the program's optimum is below it."""

import math
from dataclasses import dataclass, replace

from geopetals.errors import GeoPetalsError, MemoryShortage, UnsupportedInput
from geopetals.placement.bounds import Decomposed, decomposed, lone_push_cost_s
from geopetals.placement.exact.arc_flow import ArcFlow, Options, all_spans
from geopetals.placement.exact.program import Solved, solve
from geopetals.plan import Chain, Placement
from geopetals.problem import Ints, Problem
from geopetals.routing.exact import checked_sessions, exact_routing, total_s
from geopetals.timing import Objective, session_costs

WIDENINGS = (0.002, 0.01, 0.05, 0.25)
"""Of the cutoff above the bound. A wider program takes longer; each gets half of the time that is left."""
EXACT = 1e-6
"""Relative gap up to which a cost counts as the least: what the solvers' own tolerances leave."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExactResult:
    """Total seconds over all sessions. No placement and routing costs less than bound_s."""

    placement: Placement
    chains_by_client: tuple[tuple[Chain, ...], ...]
    cost_s: float
    bound_s: float
    proven: bool
    """Whether cost_s is the least, to one part in a million."""


def exact_placement(
    problem: Problem,
    sessions: Ints,
    *,
    objective: Objective = "relay",
    time_limit_s: float | None = None,
    seed: int = 0,
) -> ExactResult:
    """For `sessions` (C,) at once. After time_limit_s of solving, the best solution found and what is proven of it.

    Raises MemoryShortage if no placement carries the sessions, UnsupportedInput if the time was too short to find one.
    """
    counts = checked_sessions(problem, sessions)
    found = decomposed(problem, counts, objective=objective)
    if found is None or math.isinf(found.bound_s):
        raise _shortage(counts)
    best = _searched(problem, counts, objective, seed)
    bound_s, left_s, closed = found.bound_s, math.inf if time_limit_s is None else time_limit_s, False
    if objective == "push":
        bound_s = max(bound_s, lone_push_cost_s(problem, counts))
    for cutoff_s, share in _cutoffs(found.bound_s, best):
        if best is not None and best.cost_s <= bound_s * (1 + EXACT):
            break
        flow = _program(problem, counts, objective, found, cutoff_s)
        if best is not None:
            flow.hint(best.placement, best.chains_by_client)
        limit_s = None if time_limit_s is None else share * left_s
        solved = solve(flow.program, solver="SAT", time_limit_s=limit_s, seed=seed)
        left_s -= solved.wall_s
        bound_s = max(bound_s, min(solved.bound, cutoff_s))
        best, closed = _better(best, problem, flow, solved, objective), solved.optimal
    if best is None:
        if closed:
            raise _shortage(counts)
        raise UnsupportedInput(f"No placement was found in {time_limit_s} s: allow more time, or search instead.")
    bound_s = min(bound_s, best.cost_s)
    return replace(best, bound_s=bound_s, proven=best.cost_s <= bound_s * (1 + EXACT))


def _cutoffs(bound_s: float, best: ExactResult | None) -> list[tuple[float, float]]:
    """Cutoffs to try in turn, each with its share of the time that is left. The last keeps every better solution."""
    last_s = math.inf if best is None else best.cost_s
    narrower = [bound_s * (1 + widening) for widening in WIDENINGS]
    return [(cutoff_s, 0.5) for cutoff_s in narrower if cutoff_s < last_s] + [(last_s, 1.0)]


def _program(problem: Problem, counts: Ints, objective: Objective, found: Decomposed, cutoff_s: float) -> ArcFlow:
    sizes, most_flow = found.kept(cutoff_s)
    options = Options(spans=all_spans(problem, found.sizes, sizes), most_flow=most_flow)
    return ArcFlow(problem, session_costs(problem, objective), counts, options)


def _better(
    best: ExactResult | None, problem: Problem, flow: ArcFlow, solved: Solved, objective: Objective
) -> ExactResult | None:
    if solved.values is None:
        return best
    chains = flow.chains(solved.values)
    cost_s = total_s(problem, chains, objective)
    if best is not None and best.cost_s <= cost_s:
        return best
    placement = flow.placement(solved.values)
    return ExactResult(placement=placement, chains_by_client=chains, cost_s=cost_s, bound_s=0.0, proven=False)


def _searched(problem: Problem, counts: Ints, objective: Objective, seed: int) -> ExactResult | None:
    """A good solution to begin with: the smaller the cutoff, the smaller the program."""
    from geopetals.placement.search import search_placement

    try:
        placement = search_placement(problem, counts, objective=objective, seed=seed).placement
        cost_s, chains = exact_routing(problem, placement, counts, objective=objective)
    except GeoPetalsError:
        return None
    return ExactResult(placement=placement, chains_by_client=chains, cost_s=cost_s, bound_s=0.0, proven=False)


def _shortage(counts: Ints) -> MemoryShortage:
    return MemoryShortage(f"No placement carries {counts.sum()} sessions at once: add servers, or plan for fewer.")
