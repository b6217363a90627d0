"""What a placement costs where sessions queue for compute: servers decode for several at once, and slower for it.

As in routing.contention, a session counts on a server by the share of its decode step that it computes there, its duty,
and every other session's duty lengthens its steps there. Sessions go in small batches, each on the chain that adds the
least to the time of all sessions, those already routed included.
"""

from collections.abc import Sequence

import numpy as np

from geopetals.placement.search.carrying import INFINITE, Arc, Batch, Carrier, push_steps, relay_steps
from geopetals.placement.search.instance import Delays, Instance, as_lists
from geopetals.timing import decode_costs

ROUNDS = 8
"""A client's sessions are routed in at least that many batches, or one at a time."""


class CongestedCarrier(Carrier):
    """A Carrier whose sessions slow each other down."""

    def __init__(self, instance: Instance) -> None:
        super().__init__(instance)
        problem = instance.problem
        sharing = np.zeros(problem.num_servers) if problem.contention is None else problem.contention.session_s
        self._slower_s: list[float] = ((problem.output_tokens - 1) * sharing).tolist()
        """[j]: of a session for each block and each other session that the server always computes for."""
        self._decode = as_lists(decode_costs(problem, instance.objective), instance.clients)

    def cost_s(
        self, starts: Sequence[int], ends: Sequence[int], limit_s: float = INFINITE, log: list[Batch] | None = None
    ) -> float:
        instance = self.instance
        free = self.free_slots(starts, ends)
        steps = push_steps(starts, ends) if self.push else relay_steps(starts, ends)
        busy = _Busy(instance.num_servers, self._slower_s)
        done_s = 0.0
        for client, later_s in zip(instance.clients, self._floors_s, strict=True):
            arcs = self.arcs(client, steps, starts, ends, free)
            left = int(instance.sessions[client])
            most = max(left // ROUNDS, 1)
            while left:
                path, _ = self.cheapest(self._with_queueing(client, arcs, busy))
                if not path:
                    done_s += self.penalty_s(left, arcs, ends)
                    break
                total_s = self._time_s(self.instance.delays, client, path)
                batch = min(left, most, min([free[arc[4]] // arc[3] for arc in path]))
                step_s = self._time_s(self._decode, client, path)
                for _, _, _, k, j in path:
                    free[j] -= batch * k
                    if j < instance.num_servers and step_s:
                        busy.add(j, batch, k, self._decode.block_s[j] * k / step_s)
                done_s += batch * total_s
                left -= batch
                if done_s + busy.total_s + later_s >= limit_s:
                    return done_s + busy.total_s + later_s
                if log is not None:
                    log.append(self.batch(client, batch, total_s, path))
                arcs = [arc for arc in arcs if free[arc[4]] >= arc[3]]
        return done_s + busy.total_s

    def _with_queueing(self, client: int, arcs: list[Arc], busy: "_Busy") -> list[Arc]:
        """Each arc dearer by what a session there takes longer, and makes the others take longer."""
        tokens = self.instance.problem.output_tokens
        step_s = self.instance.least_s[client] / tokens or INFINITE
        duty = [block_s / step_s for block_s in self._decode.block_s] + [0.0]
        extra_s = [s * (n + b * d) for s, n, b, d in zip(self._slower_s, busy.duty, busy.blocks, duty, strict=False)]
        extra_s.append(0.0)
        return [(cost_s + extra_s[j] * k, p, e, k, j) for cost_s, p, e, k, j in arcs]

    def _time_s(self, delays: Delays, client: int, path: list[Arc]) -> float:
        """Of a chain without others."""
        total_s = 0.0
        for _, tail, _, blocks, j in path:
            if not self.push:
                total_s += delays.hop_s[client][j] + delays.block_s[j] * blocks
            elif j == self.instance.num_servers:
                total_s += delays.links[client].last[tail - 1]
            else:
                link_s = delays.between_s[tail - 1][j] if tail else delays.links[client].first[j]
                total_s += link_s + delays.block_s[j] * blocks
        return total_s


class _Busy:
    """What the sessions routed so far make of each server."""

    def __init__(self, servers: int, slower_s: list[float]) -> None:
        self._slower_s = slower_s
        self.duty = [0.0] * servers
        """Mean number of sessions that the server computes for at once."""
        self.blocks = [0] * servers
        """Session-blocks in use."""
        self.total_s = 0.0
        """By how much all sessions together take longer."""

    def add(self, j: int, sessions: int, blocks: int, duty: float) -> None:
        """The old ones wait for the new ones, those for the old ones and for each other."""
        pairs = self.blocks[j] * sessions * duty + sessions * blocks * self.duty[j]
        pairs += sessions * (sessions - 1) * blocks * duty
        self.total_s += self._slower_s[j] * pairs
        self.duty[j] += sessions * duty
        self.blocks[j] += sessions * blocks
