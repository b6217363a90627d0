"""Plans: the one that `geopetals plan` makes of the same cluster, and what becomes of the swarm without a new one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from geopetals.cluster import to_problem
from geopetals.coordinator.core.plans import Layout, Plans
from geopetals.coordinator.core.subject import PlanJob
from geopetals.coordinator.messages import Span
from geopetals.errors import GeoPetalsError, UnsupportedInput
from geopetals.placement.cg_bp import blocks_to_hold
from geopetals.placement.load import cg_bp_for_demand
from geopetals.placement.search import placement_cost, search_placement, sessions_by_client
from geopetals.placement.windows import largest_sum
from geopetals.plan import Placement
from geopetals.planning.methods import Budget, Method, place
from geopetals.planning.stock import StockSwarm
from geopetals.problem import Problem
from geopetals.simulation import World, policy

_OWN = policy("geopetals")
METHOD: Method = "search"
"""As `geopetals plan` by default."""


def make_plan(job: PlanJob) -> Plans:
    """Pure, and may take seconds for hundreds of servers."""
    names = job.subject.names()
    try:
        problem = to_problem(job.cluster)
        found = place(job.cluster, problem, StockSwarm(job.cluster, problem), METHOD, "push", Budget(seed=job.seed))
    except GeoPetalsError as error:
        problem = to_problem(job.cluster, whole=False)
        stay = _stay(problem, names, job.holding)
        return Plans(
            number=job.number, sessions=0, new=None, stay=Layout(spans=stay, session_s=None), failed=str(error)[:500]
        )
    new = {name: span for name, span in zip(names, spans_of(found.placement), strict=True) if span is not None}
    stay = _stay(problem, names, job.holding)
    covered = placement_of(problem, names, stay).covers()
    return Plans(
        number=job.number,
        sessions=found.sessions,
        new=Layout(spans=new, session_s=_session_s(problem, found.placement, found.sessions)),
        stay=Layout(spans=stay, session_s=_session_s(problem, placement_of(problem, names, stay), found.sessions)),
        repair=None if covered else _repair(job, problem, names, found.sessions),
    )


def fill(problem: Problem, placement: Placement, server: int) -> Span | None:
    """What a server takes while all others keep their blocks: CG-BP, or what is missing while memory does not suffice.

    The problem may be of too few servers for the model.
    """
    pin = problem.pinned[server]
    if pin is not None:
        return Span(*pin)
    try:
        span = _OWN.join(World(problem=problem), placement, server)
    except GeoPetalsError:
        span = None  # memory does not suffice for the whole model yet
    if span is not None:
        return Span(span.start, span.end)
    blocks = int(blocks_to_hold(problem, 1)[server])
    if not blocks:
        return None
    missing = (placement.replicas() == 0).astype(np.float64)
    if not missing.any():
        missing = 1.0 / placement.replicas()
    start = largest_sum(missing, blocks, np.ones(problem.num_blocks - blocks + 1, dtype=np.bool_))
    return Span(start, start + blocks)


def spans_of(placement: Placement) -> list[Span | None]:
    """Of each server."""
    found = [placement.span(server) for server in range(len(placement))]
    return [None if span is None else Span(span.start, span.end) for span in found]


def _repair(job: PlanJob, problem: Problem, names: list[str], sessions: int) -> Layout | None:
    """The search again, where every block that has to be loaded has its price in the same coin as sessions' time."""
    warm = placement_of(problem, names, job.holding)
    try:
        lone_s = placement_cost(problem, cg_bp_for_demand(problem).placement, 1, objective="push")
        price_s = job.block_load_s * lone_s * sessions / job.horizon_s
        found = search_placement(
            problem, sessions, objective="push", seed=job.seed, warm=warm, move_s_per_block=price_s
        )
    except GeoPetalsError:
        return None
    spans = {name: span for name, span in zip(names, spans_of(found.placement), strict=True) if span is not None}
    return Layout(spans=spans, session_s=_session_s(problem, found.placement, sessions))


def _stay(problem: Problem, names: list[str], holding: Mapping[str, Span]) -> dict[str, Span]:
    """Those that hold something keep it; idle ones are filled in one after another."""
    spans = {name: holding[name] for name in names if name in holding}
    for index, name in enumerate(names):
        if name not in spans:
            span = fill(_unpinned(problem, index), placement_of(problem, names, spans), index)
            if span is not None:
                spans[name] = span
    return spans


def _unpinned(problem: Problem, server: int) -> Problem:
    """Only this server's own pin counts: the others' blocks are given."""
    pins = tuple(pin if index == server else None for index, pin in enumerate(problem.pinned))
    return replace(problem, pinned=pins)


def placement_of(problem: Problem, names: Sequence[str], spans: Mapping[str, Span]) -> Placement:
    """Of servers by their names."""
    return Placement.of([_pair(spans.get(name)) for name in names], problem.num_blocks)


def _pair(span: Span | None) -> tuple[int, int] | None:
    return None if span is None else (span.start, span.end)


def _session_s(problem: Problem, placement: Placement, sessions: int) -> float | None:
    """None if blocks are missing or the placement is not one of these servers' memory."""
    if not placement.covers():
        return None
    free = replace(problem, pinned=())
    try:
        placement.check(free)
        counts = sessions_by_client(free, sessions)
        return placement_cost(free, placement, counts, objective="push") / sessions
    except (UnsupportedInput, GeoPetalsError):
        return None
