"""What a run will come to, by the simulator: its sessions on the servers as they are, over the network as measured.

Nothing is fitted: block times are the profiles, round trips those that the hosts were just measured to have, software
per hop and what opening a session takes are measured beforehand on another network (calibration.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from geopetals.bench.workload import Request
from geopetals.cluster import Cluster
from geopetals.plan import Chain, Placement, Span
from geopetals.planning.stock import StockSwarm
from geopetals.problem import Floats, Ints, Problem
from geopetals.routing.petals import PingTimes
from geopetals.routing.state import Accounting, RouterState
from geopetals.simulation import Rules, World, policy
from geopetals.simulation.agenda import Outage
from geopetals.simulation.engine import Course
from geopetals.simulation.policies import Desk, Stock
from geopetals.simulation.result import Fate, Log
from geopetals.simulation.runs import run_course
from geopetals.simulation.sessions import Sessions
from geopetals.simulation.world import StockFacts
from live.placements import NEEDS_COORDINATOR, RELAYS, STOCK_PLACED, Spans, placement_of
from live.translation import Live

_APART_S = 1e5
"""Between sessions that are made one at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What software takes, in seconds: each hop of each pass; opening a session; and how many round trips that needs
    beyond the prompt's own: to each server one after another (relay), or to the farthest of them (push).
    """

    hop_s: float
    open_s: float
    open_rtts: float

    def to_value(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """The network: (C + J, C + J) round trips as `rtt_s` gives them, and (C,) those of clients to the coordinator."""

    rtts_s: Floats
    coordinator_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A system whose servers hold these blocks; `cluster` is the tiny one, with the profiles to count with."""

    live: Live
    system: str
    cluster: Cluster
    spans: Spans
    software: Software
    network: Measured

    @property
    def relays(self) -> bool:
        return self.system in RELAYS

    def problem(self) -> Problem:
        return self.live.problem(self.cluster, rtts=self.network.rtts_s, overhead_s=self.software.hop_s)

    def opening_s(self, client: int, chain: Chain) -> float:
        """Before the prompt is on its way."""
        clients = len(self.cluster.clients)
        distances_s = [float(self.network.rtts_s[client, clients + server]) for server in chain.servers]
        asked_s = float(self.network.coordinator_s[client]) if self.system in NEEDS_COORDINATOR else 0.0
        round_trip_s = sum(distances_s) if self.relays else max(distances_s)
        return self.software.open_s + self.software.open_rtts * round_trip_s + asked_s


def predict(subject: Subject, requests: Sequence[Request], *, closed: bool) -> list[dict[str, Any]]:
    """Of each request in the order given: ttft_s, tpot_s, e2e_s, wait_s, its chain; None where it has no answer."""
    live, world = subject.live, _world(subject)
    placement = placement_of(live, subject.spans)
    desk = _desk(subject, world, placement)
    names = live.scenario.client_names
    arrivals_s = [
        _APART_S * number if closed else float(request.arrival_s or 0.0) for number, request in enumerate(requests)
    ]
    sessions = Sessions(
        client=np.array([names.index(request.host) for request in requests]), arrival_s=np.array(arrivals_s)
    )
    outages = tuple(
        Outage(at_s=event.at_s, server=live.scenario.server_names.index(event.server), down=event.down is not None)
        for event in sorted(live.scenario.events, key=lambda each: each.at_s)
    )
    course = Course(
        world=world,
        problem=world.problem,
        sessions=sessions,
        contention=True,
        outages=outages,
        join=_joining(world, desk),
    )
    result = run_course(course, desk, placement, policy_name=subject.system)
    return [_session(subject, result.log, number) for number in range(len(requests))]


def _session(subject: Subject, log: Log, number: int) -> dict[str, Any]:
    chain = log.chains[number]
    if log.fate[number] != Fate.COMPLETED or chain is None:
        return dict.fromkeys(("ttft_s", "tpot_s", "e2e_s", "wait_s", "chain"))
    opening_s = subject.opening_s(int(log.client[number]), chain)
    arrival_s, first_s, end_s = (float(each[number]) for each in (log.arrival_s, log.first_s, log.end_s))
    steps = max(int(log.output_tokens[number]) - 1, 1)
    names = subject.live.scenario.server_names
    return {
        "ttft_s": first_s - arrival_s + opening_s,
        "tpot_s": (end_s - first_s) / steps,
        "e2e_s": end_s - arrival_s + opening_s,
        "wait_s": float(log.wait_s[number]),
        "chain": [[names[hop.server], hop.start, hop.end] for hop in chain],
    }


def _world(subject: Subject) -> World:
    problem = subject.problem()
    clients, rtts = problem.num_clients, subject.network.rtts_s
    pings = PingTimes(client_s=rtts[:clients, clients:], between_s=rtts[clients:, clients:])
    servers = StockSwarm(subject.cluster, problem).announced
    return World(problem=problem, stock=StockFacts(servers=servers, pings=pings))


def _desk(subject: Subject, world: World, placement: Placement) -> Desk:
    rules, problem = Rules(contention=True), world.problem
    if subject.relays:
        slots = np.minimum(subject.live.stock_slots(placement.held), problem.slots(placement.held))
        if subject.system != "stock":
            slots = problem.slots(placement.held)
        return Stock().desk_with(world, problem, placement, rules, slots)
    slots = problem.slots(placement.held)
    if subject.system == STOCK_PLACED:
        slots = np.minimum(slots, subject.live.stock_slots(placement.held))
    state = RouterState(
        problem,
        placement,
        slots=slots,
        objective="push",
        accounting=Accounting(),
        compute_queueing=subject.system in NEEDS_COORDINATOR,
    )
    return Desk(state=state, router=state, objective="push", batches=True)


def _joining(world: World, desk: Desk) -> Callable[[int], tuple[Span | None, int]]:
    """A server that is back has its blocks, a new one takes what we would give it."""
    own = policy("geopetals")

    def join(server: int) -> tuple[Span | None, int]:
        placement = desk.state.placement
        span = placement.span(server) or own.join(world, placement, server)
        held: Ints = np.zeros(len(placement), dtype=np.int64)
        held[server] = 0 if span is None else span.blocks
        return span, int(world.problem.slots(held)[server])

    return join


def with_profiles(cluster: Cluster, profiles: Mapping[str, Mapping[str, Any]]) -> Cluster:
    """With the times that servers measured themselves: {server: {"decode": [weights_s, session_s], "prefill_s": s}}."""
    servers = []
    for server in cluster.servers:
        found = profiles.get(str(server.id))
        assert server.decode_block is not None
        assert server.prefill_block is not None
        if found is not None:
            weights_s, session_s = found["decode"]
            server = replace(
                server,
                decode_block=replace(server.decode_block, weights_s=weights_s, session_s=session_s),
                prefill_block=replace(server.prefill_block, fixed_s=found["prefill_s"]),
            )
        servers.append(server)
    return replace(cluster, servers=tuple(servers))
