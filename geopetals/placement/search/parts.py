"""Large swarms: a few chains at a time are taken out, and their servers annealed as a swarm of their own.

Servers that other chains go through as well stay where they are, with the caches that those leave free.
"""

import random
from dataclasses import dataclass, replace

import numpy as np

from geopetals.placement.search.annealing import STRIDE, Schedule, anneal
from geopetals.placement.search.carrying import Batch, Carrier
from geopetals.placement.search.effort import Effort
from geopetals.placement.search.instance import Instance, make_instance, part_of
from geopetals.placement.search.spans import Moving, Spans

PART_SERVERS = 16
SPARE_SERVERS = 4
ROUNDS = 48
"""Parts in one search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Servers of the swarm, by their number in it, and the batches that use no others."""

    servers: list[int]
    batches: list[Batch]


def improve_by_parts(carrier: Carrier, origin: Spans, *, rng: random.Random, effort: Effort, moving: Moving) -> Spans:
    """The cheapest placement met, origin included."""
    best, log = origin, carrier.routed(origin.starts, origin.ends)
    while (spent := effort.spent()) < 1.0:
        part = _choose(carrier.instance, log, rng)
        inside = _instance_of(carrier.instance, best, part, log)
        if not inside.movable:
            effort.count(STRIDE)
            continue
        before = Spans([best.starts[j] for j in part.servers], [best.ends[j] for j in part.servers], 0.0)
        sub, there = type(carrier)(inside), _moving_of(moving, part.servers)
        before.cost_s = sub.cost_s(before.starts, before.ends) + there.total_s(before.starts, before.ends)
        schedule = Schedule(first=0.01, begin=spent, end=min(spent + 1 / ROUNDS, 1.0))
        after = anneal(sub, before, rng=rng, effort=effort, schedule=schedule, moving=there)
        if after.cost_s >= before.cost_s:
            continue
        tried = best.copy()
        for number, j in enumerate(part.servers):
            tried.starts[j], tried.ends[j] = after.starts[number], after.ends[number]
        moving_s = moving.total_s(tried.starts, tried.ends)
        tried.cost_s = moving_s + carrier.cost_s(tried.starts, tried.ends, best.cost_s - moving_s)
        if tried.cost_s < best.cost_s:
            best, log = tried, carrier.routed(tried.starts, tried.ends)
    return best


def _choose(instance: Instance, log: list[Batch], rng: random.Random) -> Part:
    """A batch, rather one that costs much more than it might, and those that share most of its servers or any."""
    used = {j for batch in log for j, _ in batch.hops}
    spare = [j for j in instance.movable if j not in used]
    servers: set[int] = set()
    left, batches = list(log), list[Batch]()
    while left:
        batch = _next(instance, left, servers, rng)
        more = servers | {j for j, _ in batch.hops}
        if batches and len(more) > PART_SERVERS:
            break
        servers = more
        batches.append(batch)
        left.remove(batch)
    chosen = sorted(servers | set(rng.sample(spare, min(len(spare), SPARE_SERVERS))))
    inside = [batch for batch in left if all(j in servers for j, _ in batch.hops)]
    return Part(servers=chosen, batches=batches + inside)


def _next(instance: Instance, left: list[Batch], servers: set[int], rng: random.Random) -> Batch:
    sharing = [batch for batch in left if any(j in servers for j, _ in batch.hops)]
    if sharing and rng.random() < 0.6:
        return rng.choice(sharing)
    lost_s = [batch.sessions * (batch.cost_s - instance.least_s[batch.client]) + 1e-9 for batch in left]
    return rng.choices(left, weights=lost_s)[0]


def _instance_of(instance: Instance, spans: Spans, part: Part, log: list[Batch]) -> Instance:
    """The part as a swarm: its sessions and those without room; servers that others use too are pinned."""
    problem = part_of(instance.problem, part.servers)
    inside = {id(batch) for batch in part.batches}
    others = [0] * instance.num_servers
    for batch in log:
        if id(batch) not in inside:
            for j, blocks in batch.hops:
                others[j] += batch.sessions * blocks
    memory_bytes, pinned = problem.memory_bytes.copy(), list(problem.pinned)
    for number, j in enumerate(part.servers):
        if others[j]:
            memory_bytes[number] -= others[j] * problem.kv_bytes
            pinned[number] = (spans.starts[j], spans.ends[j])
    sessions = instance.sessions.copy()
    for batch in log:
        if id(batch) not in inside:
            sessions[batch.client] -= batch.sessions
    return make_instance(
        replace(problem, memory_bytes=np.maximum(memory_bytes, 0), pinned=tuple(pinned)), sessions, instance.objective
    )


def _moving_of(moving: Moving, servers: list[int]) -> Moving:
    starts, ends = [moving.starts[j] for j in servers], [moving.ends[j] for j in servers]
    return Moving(starts=starts, ends=ends, block_s=moving.block_s)
