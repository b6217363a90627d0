"""The cheapest path as an integer program: a circuit through the client and the servers used, solved by CP-SAT.

Its linear relaxation has no circuits that leave out the client, so it is tight where that of relaxation.py is weak: if
most servers are needed, and some are near each other. To import the solver takes longer than most bounds do.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from geopetals.problem import Floats
from geopetals.push_bound.graph import Graph

_SEEDS = (1, 2, 3)
"""Where one run of the solver is unlucky, another is seldom."""
_WORK = 4.0
"""Of each run, in the solver's deterministic time, which repeats: some four seconds."""


def cheapest_circuit(graph: Graph, unit_s: float, reached_s: float, servers: list[int]) -> tuple[float, list[int]]:
    """A lower bound of all paths that take no more than reached_s, and the servers of the best path found, if any.

    Times are rounded down to whole units, in which the solver is exact: so the bound holds, and where the search ends
    it is below the time of the best path by less than a unit for each delay and block. Starts from the path over
    `servers`.
    """
    program, least_units = _Program(graph, unit_s, reached_s), 0.0
    for seed in _SEEDS:
        program.start_from(servers)
        solver = _solver(seed)
        status = solver.solve(program.model)
        if status == cp_model.INFEASIBLE:
            return float("inf"), []
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            least_units = max(least_units, float(solver.best_objective_bound))
            servers = program.servers(solver)
        if status == cp_model.OPTIMAL:
            break
    return least_units * unit_s, servers


def _solver(seed: int) -> Any:
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = _WORK
    return solver


class _Program:
    """Place 0 is the client, place j + 1 server j."""

    def __init__(self, graph: Graph, unit_s: float, reached_s: float) -> None:
        self.model: Any = cp_model.CpModel()
        delay_s = _delays_s(graph)
        usable = np.argwhere(np.isfinite(delay_s) & (delay_s <= reached_s)).tolist()
        self.hops: dict[tuple[int, int], Any] = {(one, other): self.model.new_bool_var("") for one, other in usable}
        used = [self.model.new_bool_var("") for _ in graph.most]
        blocks = [self.model.new_int_var(0, most, "") for most in graph.most.tolist()]
        skips = [(place, place, use.negated()) for place, use in enumerate(used, start=1)]
        self.model.add_circuit([*((*places, hop) for places, hop in self.hops.items()), *skips])
        for use, share, most, needs in zip(used, blocks, graph.most.tolist(), graph.needs.tolist(), strict=True):
            self.model.add(share >= use)
            self.model.add(share <= most * use)
            for other, needed in enumerate(used):
                if needs >> other & 1:
                    self.model.add_implication(use, needed)
        self.model.add(sum(blocks) == graph.num_blocks)
        hop_units = [int(delay_s[places] / unit_s) for places in self.hops]
        block_units = [int(each_s / unit_s) for each_s in graph.block_s.tolist()]
        self.model.minimize(cp_model.LinearExpr.weighted_sum([*self.hops.values(), *blocks], hop_units + block_units))

    def start_from(self, servers: list[int]) -> None:
        self.model.clear_hints()
        taken = set(pairwise([0, *(server + 1 for server in servers), 0]))
        for places, hop in self.hops.items():
            self.model.add_hint(hop, places in taken)

    def servers(self, solver: Any) -> list[int]:
        after = dict(places for places, hop in self.hops.items() if solver.boolean_value(hop))
        places = [after[0]]
        while places[-1]:
            places.append(after[places[-1]])
        return [place - 1 for place in places[:-1]]


def _delays_s(graph: Graph) -> Floats:
    """(J + 1, J + 1)"""
    delay_s = np.full((graph.block_s.size + 1,) * 2, np.inf)
    delay_s[0, 1:], delay_s[1:, 0], delay_s[1:, 1:] = graph.from_client_s, graph.to_client_s, graph.between_s
    return delay_s
