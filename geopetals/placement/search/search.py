"""Placement by search: the cheapest of several candidates, then made cheaper step by step."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from geopetals.placement.search.annealing import Schedule, anneal
from geopetals.placement.search.candidates import cg_bp_placements, design_loads, pods
from geopetals.placement.search.carrying import Carrier
from geopetals.placement.search.congestion import CongestedCarrier
from geopetals.placement.search.effort import Effort
from geopetals.placement.search.instance import Instance, make_instance
from geopetals.placement.search.parts import improve_by_parts
from geopetals.placement.search.priced import PodMaker
from geopetals.placement.search.rebuilding import laid_out, priced_pods, rebuilt
from geopetals.placement.search.sessions import sessions_by_client
from geopetals.placement.search.spans import Moving, Spans, no_moving
from geopetals.placement.search.spares import fill_spares
from geopetals.plan import Placement
from geopetals.problem import Ints, Problem
from geopetals.timing import Objective

WHOLE_SERVERS = 40
"""Swarms of up to that many servers are annealed as a whole, larger ones by parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The cheapest placement found."""

    placement: Placement
    sessions: tuple[int, ...]
    """Of each client, that it was made for."""
    cost_s: float
    """All sessions at once, summed; a penalty for each without room included, the price of moving not."""
    carried: tuple[int, ...]
    """Of each client, that find room."""
    cg_bp_cost_s: float | None
    """The same with CG-BP for all sessions; None if it cannot place them."""
    moved_blocks: int
    """Blocks that servers would load which they do not hold in the placement that runs; 0 without one."""
    candidates: int
    steps: int

    @property
    def left_over(self) -> int:
        """Sessions that find no room."""
        return sum(self.sessions) - sum(self.carried)


def search_placement(
    problem: Problem,
    sessions: int | Ints,
    *,
    objective: Objective = "relay",
    steps: int | None = None,
    budget_s: float | None = None,
    clock: Callable[[], float] | None = None,
    seed: int = 0,
    warm: Placement | None = None,
    move_s_per_block: float = 0.0,
) -> SearchResult:
    """The cheapest placement found for that many sessions at once (shared out by demand, or given for each client).

    CG-BP for as many sessions is one of the candidates: no placement is chosen that leaves more sessions without room,
    nor one as good at that which is dearer, moving included. What CG-BP guarantees to each session holds in the mean
    over sessions, not for each. The same seed and number of steps give the same result; with a budget
    in seconds of `clock` it depends on the machine too.
    warm: the placement that runs now; each block that a server would have to load counts as move_s_per_block more.

    Raises UnsupportedInput for arguments that make no sense, BlocksError or MemoryShortage if `warm` is not possible.
    """
    effort = Effort(steps=steps, budget_s=budget_s, clock=clock)
    instance = make_instance(problem, sessions_by_client(problem, sessions), objective)
    carrier, moving = carrier_of(instance), _moving(problem, warm, move_s_per_block)
    found = _candidates(carrier, moving, warm, effort)
    cg_bp = next((spans for name, spans in found if name == "cg_bp"), None)
    ranked = sorted((spans for _, spans in found), key=lambda spans: spans.cost_s)
    best = _improve(carrier, ranked, random.Random(seed), effort, moving)
    if not moving.block_s:
        best = fill_spares(carrier, best)
    if cg_bp is not None and sum(_carried(carrier, cg_bp)) > sum(_carried(carrier, best)):
        best = cg_bp
    return SearchResult(
        placement=best.placement(problem.num_blocks),
        sessions=tuple(instance.sessions.tolist()),
        cost_s=best.cost_s - moving.total_s(best.starts, best.ends),
        carried=_carried(carrier, best),
        cg_bp_cost_s=None if cg_bp is None else cg_bp.cost_s - moving.total_s(cg_bp.starts, cg_bp.ends),
        moved_blocks=0 if warm is None else _moved_blocks(warm, best.placement(problem.num_blocks)),
        candidates=len(found),
        steps=effort.steps,
    )


def placement_cost(
    problem: Problem, placement: Placement, sessions: int | Ints, *, objective: Objective = "relay"
) -> float:
    """Seconds of all sessions at once, summed, with a penalty for each that finds no room."""
    carrier = carrier_of(make_instance(problem, sessions_by_client(problem, sessions), objective))
    return carrier.cost_s(placement.starts.tolist(), placement.ends.tolist())


def carrier_of(instance: Instance) -> Carrier:
    return Carrier(instance) if instance.problem.contention is None else CongestedCarrier(instance)


def _candidates(carrier: Carrier, moving: Moving, warm: Placement | None, effort: Effort) -> list[tuple[str, Spans]]:
    """By name; the first cg_bp is for all sessions. CG-BP and pods for all are there however short the time is."""
    instance, total = carrier.instance, int(carrier.instance.sessions.sum())
    found = [] if warm is None else [("warm", _costed(carrier, warm, moving))]
    for load in design_loads(total):
        if load < total and effort.late:
            break
        name = "cg_bp" if load == total else "cg_bp for fewer"
        found += [(name, _costed(carrier, each, moving)) for each in cg_bp_placements(instance, load)]
        found.append(("pods", _costed(carrier, pods(instance, load), moving)))
    return found


def _costed(carrier: Carrier, placement: Placement, moving: Moving) -> Spans:
    starts, ends = placement.starts.tolist(), placement.ends.tolist()
    return Spans(starts, ends, carrier.cost_s(starts, ends) + moving.total_s(starts, ends))


def _improve(carrier: Carrier, ranked: list[Spans], rng: random.Random, effort: Effort, moving: Moving) -> Spans:
    if not carrier.instance.movable:
        return ranked[0]
    if carrier.instance.num_servers > WHOLE_SERVERS:
        origin = min([*ranked[:1], *_of_pods(carrier, rng, effort, moving)], key=lambda spans: spans.cost_s)
        return improve_by_parts(carrier, origin, rng=rng, effort=effort, moving=moving)
    return anneal(carrier, ranked[0], rng=rng, effort=effort, schedule=Schedule(), moving=moving)


def _of_pods(carrier: Carrier, rng: random.Random, effort: Effort, moving: Moving) -> list[Spans]:
    """Priced pods, improved as such: they know neither delays between servers, nor queueing, nor moving."""
    if carrier.push or carrier.instance.problem.contention is not None or moving.block_s:
        return []
    maker = PodMaker(carrier.instance)
    pods = priced_pods(maker)
    return [] if pods is None else [laid_out(carrier, rebuilt(maker, pods, rng=rng, effort=effort), rng=rng)]


def _carried(carrier: Carrier, spans: Spans) -> tuple[int, ...]:
    carried = [0] * carrier.instance.problem.num_clients
    for batch in carrier.routed(spans.starts, spans.ends):
        carried[batch.client] += batch.sessions
    return tuple(carried)


def _moving(problem: Problem, warm: Placement | None, move_s_per_block: float) -> Moving:
    if warm is None:
        return no_moving(problem.num_servers)
    warm.check(problem)
    return Moving(starts=warm.starts.tolist(), ends=warm.ends.tolist(), block_s=move_s_per_block)


def _moved_blocks(before: Placement, after: Placement) -> int:
    kept = np.minimum(before.ends, after.ends) - np.maximum(before.starts, after.starts)
    return int((after.held - np.maximum(kept, 0)).sum())
