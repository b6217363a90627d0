"""An integer program as data, and solving it with one of OR-Tools' solvers."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from geopetals.problem import Floats

Solver = Literal["SCIP", "SAT"]

_SETTINGS: dict[Solver, str] = {
    "SCIP": "limits/gap = 0\nrandomization/randomseedshift = {seed}",
    "SAT": "num_workers:1 random_seed:{seed} relative_gap_limit:0 absolute_gap_limit:0",
}


_LARGEST_COST = 1e4
"""Costs are scaled so that the largest is this: both solvers have absolute tolerances of about 1e-6."""


@dataclass(slots=True, kw_only=True)
class Program:
    """Minimise costs; rows bound sums of variables."""

    costs: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    rows: list[tuple[float, float, list[int], list[float]]] = field(default_factory=list)
    hints: dict[int, float] = field(default_factory=dict)

    def variable(self, cost: float, upper: float, *, lower: float = 0.0) -> int:
        """Its number. All variables are integers."""
        self.costs.append(cost)
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.costs) - 1

    def row(self, terms: list[tuple[int, float]], *, least: float = -math.inf, most: float = math.inf) -> None:
        self.rows.append((least, most, [number for number, _ in terms], [value for _, value in terms]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solved:
    """values is None if no solution was found; bound is infinite if it is proven that there is none."""

    values: Floats | None
    cost: float
    bound: float
    optimal: bool
    wall_s: float
    """How long the solver took."""


def solve(program: Program, *, solver: Solver, time_limit_s: float | None, seed: int) -> Solved:
    """Integer values are rounded; whoever asked checks that they keep the rows."""
    from ortools.linear_solver import linear_solver_pb2, pywraplp

    backend: Any = pywraplp.Solver.CreateSolver(solver)
    scale = _LARGEST_COST / max(max(map(abs, program.costs), default=0.0), 1e-12)
    backend.LoadModelFromProto(_message(program, scale, linear_solver_pb2.MPModelProto()))
    backend.SetSolverSpecificParametersAsString(_SETTINGS[solver].format(seed=seed % 2**31))
    backend.SetHint([backend.variable(number) for number in program.hints], list(program.hints.values()))
    parameters = pywraplp.MPSolverParameters()
    parameters.SetDoubleParam(parameters.RELATIVE_MIP_GAP, 0.0)
    if time_limit_s is not None:
        backend.SetTimeLimit(max(int(1000 * time_limit_s), 1))
    status = backend.Solve(parameters)
    wall_s = float(backend.wall_time()) / 1000
    if status == pywraplp.Solver.INFEASIBLE:
        return Solved(values=None, cost=math.inf, bound=math.inf, optimal=True, wall_s=wall_s)
    bound = float(backend.Objective().BestBound()) / scale
    if status not in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE):
        return Solved(values=None, cost=math.inf, bound=bound, optimal=False, wall_s=wall_s)
    values = np.rint([variable.solution_value() for variable in backend.variables()])
    return Solved(
        values=values,
        cost=float(np.dot(program.costs, values)),
        bound=bound,
        optimal=status == pywraplp.Solver.OPTIMAL,
        wall_s=wall_s,
    )


def _message(program: Program, scale: float, message: Any) -> Any:
    for cost, lower, upper in zip(program.costs, program.lower, program.upper, strict=True):
        message.variable.add(lower_bound=lower, upper_bound=upper, objective_coefficient=cost * scale, is_integer=True)
    for least, most, numbers, values in program.rows:
        row = message.constraint.add(lower_bound=least, upper_bound=most)
        row.var_index.extend(numbers)
        row.coefficient.extend(values)
    return message
