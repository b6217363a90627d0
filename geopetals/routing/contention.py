"""What the sessions in progress cost a newcomer in computing: a server's decode step takes longer with each of them.

A session is computed by one server of its chain at a time, so on server j it counts by the share of its decode step
that it spends computing there: its duty.
"""

import numpy as np

from geopetals.errors import UnsupportedInput
from geopetals.plan import Chain
from geopetals.problem import Floats, Problem
from geopetals.routing.graph import Arcs
from geopetals.timing import Objective, decode_costs, step_block_s

_WHOLE = 1 << 20
"""Duties are added up as integers, so that opening and closing a session restores the load exactly."""
_KEPT_CHAINS = 4096
"""Chains of clients whose duties are kept."""


class BusyServers:
    """Load of each server: the mean number of sessions that it computes for at once."""

    def __init__(self, problem: Problem, objective: Objective) -> None:
        if problem.contention is None:
            raise UnsupportedInput("Queueing for compute needs the servers' times for several sessions: give them.")
        self._problem = problem
        self._decode = decode_costs(problem, objective)
        self._duty = np.zeros(problem.num_servers, dtype=np.int64)
        self._duties: dict[tuple[int, Chain], list[tuple[int, int]]] = {}
        self._slowdown_s: Floats | None = None

    @property
    def load(self) -> Floats:
        """(J,)"""
        return np.asarray(self._duty / _WHOLE)

    def add(self, chain: Chain, client: int, sessions: int) -> None:
        """Count that many sessions more on the chain (-1: one less)."""
        self._slowdown_s = None
        for server, duty in self._duties_of(chain, client):
            self._duty[server] += sessions * duty

    def slowdown_s(self) -> Floats:
        """(J,): for each block, what a newcomer's session takes longer than alone. Not to be written to."""
        if self._slowdown_s is None:
            slower_s = step_block_s(self._problem, 1 + self.load) - step_block_s(self._problem, 1)
            self._slowdown_s = np.asarray((self._problem.output_tokens - 1) * slower_s)
        return self._slowdown_s

    def arc_slowdown_s(self, arcs: Arcs) -> Floats:
        """(arcs,)"""
        return np.asarray(self.slowdown_s().take(arcs.server) * arcs.length)

    def _duties_of(self, chain: Chain, client: int) -> list[tuple[int, int]]:
        duties = self._duties.get((client, chain))
        if duties is None:
            if len(self._duties) == _KEPT_CHAINS:
                del self._duties[next(iter(self._duties))]
            step_s = self._decode.chain_s(client, chain)
            shares = [float(self._decode.block_s[hop.server]) * hop.blocks / step_s if step_s else 0.0 for hop in chain]
            duties = [(hop.server, round(share * _WHOLE)) for hop, share in zip(chain, shares, strict=True)]
            self._duties[client, chain] = duties
        return duties
