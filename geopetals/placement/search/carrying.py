"""What a placement costs: all sessions routed through it one batch after the other, each batch on the cheapest chain
that has room, as many sessions as the tightest server of that chain holds.

Nodes of the graph are block boundaries for relay (a server is left at its end, so only ends and 0 matter) and servers
for push. Arcs are sorted so that every arc comes after those that lead to its tail: one pass finds the cheapest chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from geopetals.placement.search.instance import Instance

Arc = tuple[float, int, int, int, int]
"""Cost, tail, head, blocks, server."""
Step = tuple[int, int, int, int]
"""Tail, head, blocks, server."""
INFINITE = float("inf")
_AMPLE = 1 << 60


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sessions of one client that take the same chain, given as (server, blocks used). Two alike are two."""

    client: int
    sessions: int
    cost_s: float
    """Of each."""
    hops: tuple[tuple[int, int], ...]


class Carrier:
    """Routes the sessions of an instance through placements, given as starts and ends of all servers."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.push = instance.objective == "push"
        self.sink = instance.num_servers + 1 if self.push else instance.num_blocks
        self._floors_s = _floors_s(instance)

    def cost_s(
        self, starts: Sequence[int], ends: Sequence[int], limit_s: float = INFINITE, log: list[Batch] | None = None
    ) -> float:
        """Seconds of all sessions, penalties included. Stops as soon as it is clear that limit_s is reached.

        Returns some value of at least limit_s then. log: gets the batches that are carried.
        """
        instance = self.instance
        free = self.free_slots(starts, ends)
        steps = push_steps(starts, ends) if self.push else relay_steps(starts, ends)
        done_s = 0.0
        for client, later_s in zip(instance.clients, self._floors_s, strict=True):
            arcs = self.arcs(client, steps, starts, ends, free)
            left = int(instance.sessions[client])
            while left:
                path, total_s = self.cheapest(arcs)
                if not path:
                    done_s += self.penalty_s(left, arcs, ends)
                    break
                if done_s + left * total_s + later_s >= limit_s:
                    return done_s + left * total_s + later_s
                batch = min(left, min([free[arc[4]] // arc[3] for arc in path]))
                for arc in path:
                    free[arc[4]] -= batch * arc[3]
                done_s += batch * total_s
                left -= batch
                if log is not None:
                    log.append(self.batch(client, batch, total_s, path))
                if left:
                    arcs = [arc for arc in arcs if free[arc[4]] >= arc[3]]
        return done_s

    def routed(self, starts: Sequence[int], ends: Sequence[int]) -> list[Batch]:
        """The sessions that find room."""
        log: list[Batch] = []
        self.cost_s(starts, ends, log=log)
        return log

    def free_slots(self, starts: Sequence[int], ends: Sequence[int]) -> list[int]:
        """[j], and one more for the way back to the client, which needs none."""
        slots = self.instance.slots
        free = [slots[j][end - start] for j, (start, end) in enumerate(zip(starts, ends, strict=True))]
        free.append(_AMPLE)
        return free

    def cheapest(self, arcs: list[Arc]) -> tuple[list[Arc], float]:
        """The arcs of the cheapest chain, last first, and its cost; no arcs if there is none."""
        reached_s, via = self._reach(arcs)
        path = []
        last = via[self.sink]
        while last is not None:
            path.append(last)
            last = via[last[1]]
        return path, reached_s[self.sink]

    def arcs(
        self, client: int, steps: list[Step], starts: Sequence[int], ends: Sequence[int], free: list[int]
    ) -> list[Arc]:
        """Those of the steps that have room, with what they cost the client."""
        delays, block_s = self.instance.delays, self.instance.delays.block_s
        if not self.push:
            hop_s = delays.hop_s[client]
            return [(hop_s[j] + block_s[j] * k, p, e, k, j) for p, e, k, j in steps if free[j] >= k]
        links, between_s, way_back = delays.links[client], delays.between_s, self.instance.num_servers
        used = [j for j, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < end]
        first = [j for j in used if not starts[j] and free[j] >= ends[j]]
        arcs = [(links.first[j] + block_s[j] * ends[j], 0, j + 1, ends[j], j) for j in first]
        arcs += [(between_s[p - 1][j] + block_s[j] * k, p, e, k, j) for p, e, k, j in steps if free[j] >= k]
        last = [j for j in used if ends[j] == self.instance.num_blocks]
        return arcs + [(links.last[j], j + 1, self.sink, 1, way_back) for j in last]

    def batch(self, client: int, sessions: int, cost_s: float, path: list[Arc]) -> Batch:
        hops = tuple((j, k) for _, _, _, k, j in reversed(path) if j < self.instance.num_servers)
        return Batch(client, sessions, cost_s, hops)

    def penalty_s(self, left: int, arcs: list[Arc], ends: Sequence[int]) -> float:
        """For sessions without room; less the further the next one gets into the model: a slope for the search."""
        reached_s, _ = self._reach(arcs)
        nodes = [node for node, at_s in enumerate(reached_s) if node and at_s < INFINITE]
        blocks = [ends[node - 1] for node in nodes] if self.push else nodes
        return self.instance.penalty_s * (left + 1 - max(blocks, default=0) / self.instance.num_blocks)

    def _reach(self, arcs: list[Arc]) -> tuple[list[float], list[Arc | None]]:
        reached_s = [INFINITE] * (self.sink + 1)
        via: list[Arc | None] = [None] * (self.sink + 1)
        reached_s[0] = 0.0
        for arc in arcs:
            at_s = reached_s[arc[1]] + arc[0]
            if at_s < reached_s[arc[2]]:
                reached_s[arc[2]] = at_s
                via[arc[2]] = arc
        return reached_s, via


def relay_steps(starts: Sequence[int], ends: Sequence[int]) -> list[Step]:
    """From each end of a server to the ends of those that hold the next block."""
    used = sorted((end, start, j) for j, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < end)
    cuts = sorted({0, *(end for end, _, _ in used)})
    steps = []
    for end, start, j in used:
        for cut in cuts:
            if cut >= end:
                break
            if cut >= start:
                steps.append((cut, end, end - cut, j))
    return steps


def push_steps(starts: Sequence[int], ends: Sequence[int]) -> list[Step]:
    """From server to server; server j is node j + 1."""
    used = sorted((end, j) for j, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < end)
    return [
        (i + 1, j + 1, end - cut, j)
        for number, (end, j) in enumerate(used)
        for cut, i in used[:number]
        if starts[j] <= cut < end
    ]


def _floors_s(instance: Instance) -> list[float]:
    """For each client in order: no routing of all clients after it costs less."""
    floors, later_s = [], 0.0
    for client in reversed(instance.clients):
        floors.append(later_s)
        later_s += instance.least_s[client] * int(instance.sessions[client])
    return floors[::-1]
