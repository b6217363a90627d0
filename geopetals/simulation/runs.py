"""One policy, one seed: from a scenario to what became of its sessions."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from geopetals.cluster import Cluster, ClusterError
from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.plan import Placement, Span
from geopetals.problem import Ints, Problem
from geopetals.simulation.agenda import Outage
from geopetals.simulation.engine import Course, Engine
from geopetals.simulation.policies import Desk, Policy, Rules, policy
from geopetals.simulation.result import Fate, Result
from geopetals.simulation.scenario import Scenario
from geopetals.simulation.sessions import Sessions, draw_sessions
from geopetals.simulation.world import World

Subject = World | Cluster | Problem


def simulate(
    subject: Subject,
    scenario: Scenario,
    chosen: str | Policy,
    seed: int = 0,
    *,
    advance: Callable[[int], None] | None = None,
) -> Result:
    """Pure: the same arguments give the same result. The sessions depend on scenario and seed, not on the policy.

    advance: told every 256 arrivals how many there were. Raises UnsupportedInput, MemoryShortage, or what else placing
    and routing raise for a swarm that cannot serve the model at all.
    """
    world = World.of(subject)
    rules = rules_of(scenario, world.problem)
    if rules.contention and world.problem.contention is None:
        raise UnsupportedInput("contention: the servers' times for several sessions are not known: leave it out.")
    sessions = draw_sessions(scenario.load, world, seed)
    outages = outages_of(scenario, subject, world.problem)
    named = policy(chosen, sessions=_planned_sessions(subject)) if isinstance(chosen, str) else chosen
    placement = named.place(_at_first(world, outages), seed)
    unit = world.problem if sessions.prompt_tokens is None else world.paged()
    desk = named.desk(world, unit, placement, rules)
    course = Course(
        world=world,
        problem=unit,
        sessions=sessions,
        contention=rules.contention,
        warm_up=warm_up_of(scenario, sessions),
        max_wait_s=scenario.max_wait_s,
        until_s=float("inf") if scenario.load.duration_s is None else scenario.load.duration_s,
        outages=outages,
        join=_joining(world, unit, named, desk),
    )
    return run_course(course, desk, placement, policy_name=named.name, seed=seed, advance=advance)


def run_course(
    course: Course,
    desk: Desk,
    placement: Placement,
    *,
    policy_name: str,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Result:
    """The sessions of the course at this desk."""
    engine = Engine(course, desk, advance)
    engine.run()
    values_s, weights = engine.intervals()
    return Result(
        policy=policy_name,
        seed=seed,
        log=engine.log,
        placement=placement,
        warm_up=course.warm_up,
        until_s=engine.now,
        interval_s=values_s,
        interval_weight=weights,
        memory_use=engine.memory_use(),
        compute_use=engine.compute_use(),
        max_concurrent=engine.max_concurrent,
        counted={fate.name.lower(): int((engine.log.fate == fate).sum()) for fate in Fate},
    )


def rules_of(scenario: Scenario, problem: Problem) -> Rules:
    """Unless the scenario says otherwise, servers slow down with their sessions where it is known by how much."""
    paper, contention = scenario.mode == "paper", scenario.contention
    if contention is None:
        contention = not paper and problem.contention is not None
    return Rules(paper=paper, contention=contention, batching=scenario.batching, constants=scenario.constants)


def outages_of(scenario: Scenario, subject: Subject, problem: Problem) -> tuple[Outage, ...]:
    """Servers by their names in a cluster, else by their index."""
    names = [str(index) for index in range(problem.num_servers)]
    if isinstance(subject, Cluster):
        names = [str(server.id) for server in subject.servers]
    outages = []
    for number, event in enumerate(scenario.events or ()):
        if event.server not in names:
            raise ClusterError(("events", number), f"there is no server {event.server!r}: use one of the cluster's.")
        outages.append(Outage(at_s=event.at_s, server=names.index(event.server), down=event.down is not None))
    return tuple(sorted(outages, key=lambda each: each.at_s))


def warm_up_of(scenario: Scenario, sessions: Sessions) -> int:
    """As given, else a tenth; one session at least is measured."""
    given = scenario.load.warm_up
    return min(len(sessions) // 10 if given is None else given, len(sessions) - 1)


def _planned_sessions(subject: Subject) -> int | None:
    return subject.workload.sessions if isinstance(subject, Cluster) else None


def _at_first(world: World, outages: tuple[Outage, ...]) -> World:
    """Without the servers that come later: they have no memory, and no blocks that must stay."""
    first: dict[int, Outage] = {}
    for outage in outages:
        first.setdefault(outage.server, outage)
    absent = [server for server, outage in first.items() if not outage.down]
    if not absent:
        return world
    problem, memory = world.problem, world.problem.memory_bytes.copy()
    memory[absent] = 0.0
    pinned = tuple(None if server in absent else pin for server, pin in enumerate(problem.pinned))
    return replace(world, problem=replace(problem, memory_bytes=memory, pinned=pinned))


def _joining(world: World, unit: Problem, named: Policy, desk: Desk) -> Callable[[int], tuple[Span | None, int]]:
    """A server that is back serves its blocks again; one that is new takes what the policy gives it. Nobody moves."""

    def join(server: int) -> tuple[Span | None, int]:
        placement = desk.state.placement
        span = placement.span(server)
        if span is None:
            try:
                span = named.join(world, placement, server)
            except MemoryShortage:
                return None, 0
        held: Ints = np.zeros(len(placement), dtype=np.int64)
        held[server] = 0 if span is None else span.blocks
        return span, int(named.slots(world, unit, held)[server])

    return join
