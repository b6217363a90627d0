"""The paper's integer program (arXiv 2512.21884), every session and link by itself: the reference for small cases.

| paper        | here      | meaning                                                                               |
| ------------ | --------- | ------------------------------------------------------------------------------------- |
| f^r_ij       | link      | session r goes from i to j; i may be its client (first hop), j too (last hop); binary |
| a_j, m_j     | start, held | first block, from 0, and number of blocks of server j; e_j = a_j + m_j              |
| alpha, gamma | of_next   | a_j f^r_ij and m_j f^r_ij                                                             |
| beta, delta  | of_before | a_i f^r_ij and m_i f^r_ij                                                             |

A hop from i to j is allowed iff a_j <= e_i < e_j and uses e_j - e_i blocks. The products are linear by big-M with L.
Its relaxation is weak: it stops closing at about 9 servers and 3 sessions, where arc_flow.py goes on.
"""

import math
from dataclasses import dataclass

import numpy as np

from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.placement.exact.program import Program, solve
from geopetals.plan import Placement
from geopetals.problem import Floats, Ints, Problem
from geopetals.timing import HopCosts, Objective, session_costs

Terms = list[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferenceResult:
    placement: Placement
    cost_s: float
    """The least sum of all sessions' costs."""


def reference_placement(problem: Problem, sessions: Ints, *, objective: Objective = "relay") -> ReferenceResult:
    """For `sessions` (C,) at once. Raises MemoryShortage if no placement carries them."""
    model = _Reference(problem, session_costs(problem, objective))
    for client, count in enumerate(np.asarray(sessions).tolist()):
        for _ in range(count):
            model.add_session(client)
    model.limit_memory()
    solved = solve(model.program, solver="SCIP", time_limit_s=None, seed=0)
    if solved.bound == math.inf:
        raise MemoryShortage(f"No placement carries {np.sum(sessions)} sessions at once: add servers.")
    if solved.values is None:
        raise UnsupportedInput("The solver gave up: the problem is too large for the reference program.")
    return ReferenceResult(placement=model.placement(solved.values), cost_s=solved.cost)


class _Reference:
    def __init__(self, problem: Problem, costs: HopCosts) -> None:
        self._problem, self._costs = problem, costs
        self.program = Program()
        self._most = problem.num_blocks
        pins = problem.pinned
        self._starts = [
            self.program.variable(0.0, self._most if pin is None else pin[0], lower=0 if pin is None else pin[0])
            for pin in pins
        ]
        self._held = [
            self.program.variable(
                0.0,
                int(limit) if pin is None else pin[1] - pin[0],
                lower=0 if pin is None else pin[1] - pin[0],
            )
            for limit, pin in zip(problem.max_blocks, pins, strict=True)
        ]
        for start, held in zip(self._starts, self._held, strict=True):
            self.program.row([(start, 1.0), (held, 1.0)], most=self._most)
        self._used: list[Terms] = [[] for _ in pins]
        """For each server the blocks that sessions use on it."""

    def add_session(self, client: int) -> None:
        servers = range(self._problem.num_servers)
        into: list[Terms] = [[] for _ in servers]
        out: list[Terms] = [[] for _ in servers]
        leaving: Terms = []
        for after in servers:
            first_s, last_s = self._end_delays_s(client, after)
            if np.isfinite(first_s):
                leaving.append((self._link(None, after, first_s, into, out), 1.0))
            if np.isfinite(last_s):
                self._last(after, last_s, out)
            for before in servers:
                delay_s = self._between_s(client, before, after)
                if before != after and np.isfinite(delay_s):
                    self._link(before, after, delay_s, into, out)
        self.program.row(leaving, least=1.0, most=1.0)
        for server in servers:
            self.program.row(into[server] + [(link, -1.0) for link, _ in out[server]], least=0.0, most=0.0)

    def limit_memory(self) -> None:
        problem = self._problem
        for server, used in enumerate(self._used):
            weights = (self._held[server], problem.block_bytes / problem.kv_bytes)
            room = float(problem.memory_bytes[server]) / problem.kv_bytes
            self.program.row([weights, *used], most=room)

    def placement(self, values: Floats) -> Placement:
        pairs = zip(values[self._starts].astype(int).tolist(), values[self._held].astype(int).tolist(), strict=True)
        return Placement.of([(start, start + held) if held else None for start, held in pairs], self._most)

    def _end_delays_s(self, client: int, server: int) -> tuple[float, float]:
        push = self._costs.push
        if push is None:
            return self._between_s(client, server, server), 0.0
        return float(push.from_client_s[client, server]), float(push.to_client_s[server, client])

    def _between_s(self, client: int, before: int, after: int) -> float:
        if self._costs.push is not None:
            return float(self._costs.push.between_s[before, after])
        return math.inf if self._costs.relay_s is None else float(self._costs.relay_s[client, after])

    def _link(self, before: int | None, after: int, delay_s: float, into: list[Terms], out: list[Terms]) -> int:
        block_s = float(self._costs.block_s[after])
        link = self.program.variable(delay_s, 1.0)
        of_next = [self._product(link, number, block_s) for number in (self._starts[after], self._held[after])]
        of_before: list[int] = []
        into[after].append((link, 1.0))
        if before is not None:
            out[before].append((link, 1.0))
            of_before = [self._product(link, each, -block_s) for each in (self._starts[before], self._held[before])]
        end = [(number, 1.0) for number in of_before]
        self.program.row([(of_next[0], 1.0)] + [(number, -1.0) for number in of_before], most=0.0)
        blocks = [(number, 1.0) for number in of_next] + [(number, -1.0) for number, _ in end]
        self.program.row([*blocks, (link, -1.0)], least=0.0)
        self._used[after] += blocks
        return link

    def _last(self, server: int, delay_s: float, out: list[Terms]) -> None:
        """The link back to the client: only a server that holds the last block has one."""
        link = self.program.variable(delay_s, 1.0)
        out[server].append((link, 1.0))
        end = [(self._starts[server], 1.0), (self._held[server], 1.0)]
        self.program.row([*end, (link, -float(self._most))], least=0.0)

    def _product(self, link: int, number: int, cost_s: float) -> int:
        """A variable that equals `number` where the link is taken, else 0."""
        most = float(self._most)
        product = self.program.variable(cost_s, most)
        self.program.row([(product, 1.0), (link, -most)], most=0.0)
        self.program.row([(product, 1.0), (number, -1.0)], most=0.0)
        self.program.row([(product, 1.0), (number, -1.0), (link, -most)], least=-most)
        return product
