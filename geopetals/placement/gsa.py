"""GSA, greedy server assignment: the paper's special case of one client and servers that hold equally many blocks.

| paper | here       | meaning                                                             |
| ----- | ---------- | ------------------------------------------------------------------- |
| m, n  | blocks     | blocks per server; n = ceil(L / m) stages, the last may be shorter  |
| t_j   | hop_s      | delay and computing m blocks                                        |
| f_j   | capacity   | sessions that server j can hold                                     |
| C_k   | served     | sessions that the servers of stage k carry                          |
| T_k   | deficit    | how much stage k still gains from one more server                   |
"""

import math
from dataclasses import dataclass

import numpy as np

from geopetals.errors import MemoryShortage, NoChain
from geopetals.placement.windows import TOLERANCE, ranks
from geopetals.plan import Chain, Hop, Placement
from geopetals.problem import Floats, Ints, Problem

_MARGIN_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagePlan:
    """Each server's stage, from 0 (-1: too small for any), the placement that follows, and how many it can carry."""

    stages: Ints
    placement: Placement
    capacity: Ints
    hop_s: Floats


def gsa(problem: Problem, sessions: int, *, blocks: int, client: int = 0) -> StagePlan:
    """Assign servers to stages for `sessions` at once. Raises MemoryShortage if a stage stays without server."""
    stage_count = math.ceil(problem.num_blocks / blocks)
    fits = (problem.memory_bytes >= problem.block_bytes * blocks) & (problem.max_blocks >= blocks)
    held = np.where(fits, blocks, 0)
    capacity = np.where(fits, problem.slots(held) // blocks, 0)
    hop_s = problem.relay_decode_s[client] + problem.decode_block_s * blocks
    stages = _assign(sessions, stage_count, hop_s, capacity, np.flatnonzero(fits))
    if np.unique(stages[stages >= 0]).size < stage_count:
        raise MemoryShortage(f"Too few servers can hold {blocks} blocks for {stage_count} stages: add servers.")
    starts = np.where(fits, stages * blocks, 0)
    ends = np.where(fits, np.minimum(starts + blocks, problem.num_blocks), 0)
    placement = Placement(num_blocks=problem.num_blocks, starts=starts, ends=ends)
    return StagePlan(stages=stages, placement=placement, capacity=capacity, hop_s=hop_s)


def gsa_chains(plan: StagePlan, sessions: int) -> list[Chain]:
    """The chains of sessions that begin together: in each stage the fastest server that still has room.

    Raises NoChain when a stage is full.
    """
    fastest = [np.flatnonzero(plan.stages == stage) for stage in range(int(plan.stages.max()) + 1)]
    fastest = [servers[np.argsort(plan.hop_s[servers], kind="stable")] for servers in fastest]
    left = plan.capacity.copy()
    chains = []
    for number in range(sessions):
        hops = []
        for stage, servers in enumerate(fastest):
            free = servers[left[servers] > 0]
            if not free.size:
                raise NoChain(
                    f"Stage {stage} is full after {number} of {sessions} sessions: add servers or plan again."
                )
            server = int(free[0])
            left[server] -= 1
            hops.append(Hop(server, int(plan.placement.starts[server]), int(plan.placement.ends[server])))
        chains.append(Chain(tuple(hops)))
    return chains


def _assign(
    sessions: int,
    stage_count: int,
    hop_s: Floats,
    capacity: Ints,
    servers: Ints,
) -> Ints:
    slowest_s = float(hop_s[servers].max(initial=0.0)) + _MARGIN_S
    served = np.zeros(stage_count, dtype=np.int64)
    deficit = np.full(stage_count, sessions * slowest_s)
    stages = np.full(hop_s.size, -1)
    for server in servers[np.argsort(ranks(hop_s[servers]), kind="stable")].tolist():
        lacking = served < sessions
        if lacking.any():
            best = float(deficit[lacking].max())
            stage = int(np.argmax(lacking & (deficit >= best - TOLERANCE * abs(best))))
        else:
            stage = int(served.argmin())
        stages[server] = stage
        carries = min(max(sessions - int(served[stage]), 0), int(capacity[server]))
        deficit[stage] -= (slowest_s - float(hop_s[server])) * carries
        served[stage] += int(capacity[server])
    return stages
