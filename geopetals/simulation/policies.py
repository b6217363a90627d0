"""The policies that can be compared: how blocks are placed, how a session gets its chain, and when it may start.

They only put together what the planning core has; the coordinator and these make the same decisions by the same code.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from geopetals.errors import UnsupportedInput
from geopetals.placement.cg_bp import CgBp, cg_bp
from geopetals.placement.demand import search_for_demand
from geopetals.placement.load import cg_bp_for_demand
from geopetals.placement.petals import blocks_to_hold, cache_slots, petals_placement
from geopetals.placement.search import search_placement
from geopetals.plan import Placement, Route, Span
from geopetals.problem import Ints, Problem
from geopetals.routing.backoff import paper_accounting
from geopetals.routing.petals import LeastWaitRouter, PetalsRouter
from geopetals.routing.state import Accounting, RouterState
from geopetals.simulation.scenario import POLICIES, Constants
from geopetals.simulation.world import StockFacts, World
from geopetals.timing import Objective

SEARCH_STEPS = 2_000
NO_CONSTANTS = Constants()

PolicyName = Literal["petals", "petals+order", "petals+number", "petals+routing", "paper", "geopetals"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for all policies of a run."""

    paper: bool = False
    """The accounting of the paper's simulator."""
    contention: bool = False
    batching: str = "own"
    """Whose servers compute sessions that wait in one step: `own` (geopetals), `all` or `none`."""
    constants: Constants = NO_CONSTANTS

    def batches(self, *, own: bool) -> bool:
        return self.batching == "all" or (own and self.batching == "own")


class Router(Protocol):
    """Decides on a chain; nothing is held before the route is opened on the state."""

    def route(self, client: int, now: float, *, slots_per_block: int = 1) -> Route: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Desk:
    """Where sessions are admitted under a policy: the state, who decides on it, and the manner of waiting."""

    state: RouterState
    router: Router
    objective: Objective
    batches: bool
    """Sessions that wait at a server are computed in one step; otherwise one after another."""
    retries: bool = False
    """A session that finds no cache tries again, as if it were new, at PETALS' instants: nothing is promised to it."""
    constant_s: float = 0.0


class Policy(Protocol):
    """Thin: state is kept by the desk. Methods raise MemoryShortage or UnsupportedInput."""

    @property
    def name(self) -> str: ...

    def place(self, world: World, seed: int) -> Placement:
        """Where servers begin; those without memory hold nothing."""
        ...

    def slots(self, world: World, problem: Problem, held: Ints) -> Ints:
        """(J,): cache slots of servers that hold so many blocks; `problem` has the unit of cache."""
        ...

    def desk(self, world: World, problem: Problem, placement: Placement, rules: Rules) -> Desk:
        """`problem` is the world's, in the unit of cache in which sessions are counted."""
        ...

    def join(self, world: World, placement: Placement, server: int) -> Span | None:
        """What a server takes that comes while all others keep their blocks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """CG-BP and WS-RR as published (`paper`); or the search, reservation, and push where delays are known."""

    published: bool
    sessions: int | None = None
    """To plan for at once; None: by demand."""
    steps: int = SEARCH_STEPS

    @property
    def name(self) -> str:
        return "paper" if self.published else "geopetals"

    def place(self, world: World, seed: int) -> Placement:
        problem = world.problem
        if self.published:
            return _cg_bp(problem, self.sessions).placement
        objective = self._objective(problem)
        if self.sessions is not None:
            return search_placement(problem, self.sessions, objective=objective, steps=self.steps, seed=seed).placement
        return search_for_demand(problem, objective=objective, steps=self.steps, seed=seed).placement

    def slots(self, world: World, problem: Problem, held: Ints) -> Ints:
        del world
        return problem.slots(held)

    def desk(self, world: World, problem: Problem, placement: Placement, rules: Rules) -> Desk:
        constant_s = rules.constants.initial_s + rules.constants.planned_s
        state = RouterState(
            problem,
            placement,
            objective=self._objective(problem),
            accounting=paper_accounting(constant_s) if self.published else Accounting(constant_s=constant_s),
            compute_queueing=rules.contention and not self.published,
        )
        return Desk(
            state=state,
            router=state,
            objective=self._objective(problem),
            batches=rules.batches(own=not self.published),
            constant_s=constant_s,
        )

    def join(self, world: World, placement: Placement, server: int) -> Span | None:
        """CG-BP with all others pinned."""
        problem = world.problem
        pins = tuple(
            None if index == server or (span := placement.span(index)) is None else (span.start, span.end)
            for index in range(len(placement))
        )
        memory = problem.memory_bytes * ((placement.held > 0) | (np.arange(len(placement)) == server))
        return _cg_bp(replace(problem, pinned=pins, memory_bytes=memory), self.sessions).placement.span(server)

    def _objective(self, problem: Problem) -> Objective:
        return "relay" if self.published or problem.push is None else "push"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """Stock PETALS with random order of joining, or with one of the paper's three improvements."""

    order: tuple[int, ...] | None = None
    """In which servers join; None: random, by the seed."""
    planned_order: bool = False
    planned_number: bool = False
    planned_routing: bool = False
    sessions: int | None = None
    """What CG-BP plans for, whose order and numbers are used."""
    hop_overhead_s: float = 0.018
    full_penalty_s: float = 10.0

    @property
    def name(self) -> str:
        if self.planned_order:
            return "petals+order"
        return "petals+number" if self.planned_number else "petals+routing" if self.planned_routing else "petals"

    def place(self, world: World, seed: int) -> Placement:
        problem, servers = world.problem, _stock(world).servers
        held = blocks_to_hold(problem, servers)
        order = self.order or tuple(np.random.default_rng([seed, 99]).permutation(problem.num_servers).tolist())
        if self.planned_order or self.planned_number:
            found = _cg_bp(problem, self.sessions)
            order = found.order if self.planned_order else order
            held = found.placement.held if self.planned_number else held
        return petals_placement(problem, held, servers.announced_rps(held), order)

    def slots(self, world: World, problem: Problem, held: Ints) -> Ints:
        if self.planned_number:
            return problem.slots(held)
        return np.minimum(cache_slots(problem, _stock(world).servers, held), problem.slots(held))

    def desk(self, world: World, problem: Problem, placement: Placement, rules: Rules) -> Desk:
        slots = self.slots(world, problem, placement.held)
        if rules.paper and not self.planned_number:
            slots = cache_slots(problem, _stock(world).servers, placement.held)
        return self.desk_with(world, problem, placement, rules, slots)

    def desk_with(self, world: World, problem: Problem, placement: Placement, rules: Rules, slots: Ints) -> Desk:
        """The desk for servers with so many slots."""
        constant_s = rules.constants.initial_s + rules.constants.petals_s
        paper = rules.paper
        accounting = paper_accounting(constant_s) if paper else Accounting(constant_s=constant_s)
        state = RouterState(problem, placement, slots=slots, accounting=accounting)
        return Desk(
            state=state,
            router=self._router(world, problem, state, paper=paper),
            objective="relay",
            batches=rules.batches(own=False),
            retries=not paper,
            constant_s=constant_s,
        )

    def capacity(self, world: World, problem: Problem, placement: Placement) -> Ints:
        """(J,): sessions that the paper's simulator lets a server have before it counts as full."""
        held = placement.held
        if self.planned_number:
            return np.asarray(problem.slots(held) // np.maximum(held, 1))
        return np.full(held.size, int(_stock(world).servers.cache_bytes // problem.kv_bytes))

    def join(self, world: World, placement: Placement, server: int) -> Span | None:
        """PETALS' rule, the others being there before."""
        problem, servers = world.problem, _stock(world).servers
        spans = [placement.span(index) for index in range(len(placement))]
        present = [index for index, span in enumerate(spans) if span is not None and index != server]
        held = np.where(placement.held > 0, placement.held, blocks_to_hold(problem, servers))
        pins = tuple((span.start, span.end) if span and index != server else None for index, span in enumerate(spans))
        fixed = replace(problem, pinned=pins)
        order = [*present, server]
        return petals_placement(fixed, held, servers.announced_rps(held), order).span(server)

    def _router(self, world: World, problem: Problem, state: RouterState, *, paper: bool) -> Router:
        if self.planned_routing:
            return LeastWaitRouter(state)
        return PetalsRouter(
            state,
            _stock(world).pings,
            session_capacity=self.capacity(world, problem, state.placement) if paper else None,
            hop_overhead_s=self.hop_overhead_s,
            full_penalty_s=self.full_penalty_s,
        )


def policy(name: str, *, sessions: int | None = None) -> Policy:
    """One of POLICIES. sessions: how many at once it plans for; None: by demand."""
    if name in ("paper", "geopetals"):
        return Planned(published=name == "paper", sessions=sessions)
    if name not in POLICIES:
        raise UnsupportedInput(f"There is no policy {name!r}: choose one of {', '.join(POLICIES)}.")
    return Stock(
        planned_order=name == "petals+order",
        planned_number=name == "petals+number",
        planned_routing=name == "petals+routing",
        sessions=sessions,
    )


def _stock(world: World) -> StockFacts:
    if world.stock is None:
        raise UnsupportedInput("What stock PETALS measures is not known: simulate a cluster, or give World.stock.")
    return world.stock


def _cg_bp(problem: Problem, sessions: int | None) -> CgBp:
    return cg_bp_for_demand(problem) if sessions is None else cg_bp(problem, sessions)
