"""The restricted master problem of the decomposition: a linear program over the columns found so far (GLOP)."""

from typing import Any

import numpy as np
from ortools.linear_solver import pywraplp

from geopetals.placement.bounds.prices import Rows
from geopetals.placement.bounds.pricing import Column
from geopetals.problem import Floats

Terms = list[tuple[int, float]]


class Master:
    """Least cost of columns and of sessions that are not served, each at `penalty_s`, which makes it feasible."""

    def __init__(self, rows: Rows, penalty_s: float) -> None:
        self.rows = rows
        self._penalty_s = penalty_s
        self._columns: list[tuple[int, Column]] = []
        self._terms: list[tuple[float, Terms]] = []
        self._known: set[tuple[int, Column]] = set()
        self._program = _Program(rows, penalty_s)
        self.used: tuple[tuple[int, Column, float], ...] = ()
        """(client, column, sessions) of the last solution."""
        self.unserved = float(rows.sessions.sum())
        """Sessions which it leaves out."""

    def add(self, client: int, column: Column, cost_s: float) -> None:
        """Does nothing if the column is known."""
        if (client, column) in self._known:
            return
        self._known.add((client, column))
        counts: dict[int, float] = {}
        for row, count in self.rows.counts(client, column):
            counts[row] = counts.get(row, 0.0) + count
        self._columns.append((client, column))
        self._terms.append((cost_s, [(self.rows.count + client, 1.0), *counts.items()]))
        self._program.add(*self._terms[-1])

    def solve(self) -> tuple[float, Floats] | None:
        """The least cost and the prices of the rows; None if the solver gave up."""
        if not self._program.solve():
            # GLOP starts from the basis of the program before, and may lose its footing in it.
            self._program = _Program(self.rows, self._penalty_s)
            for cost_s, terms in self._terms:
                self._program.add(cost_s, terms)
            if not self._program.solve():
                return None
        amounts = zip(self._columns, self._program.amounts, strict=True)
        self.used = tuple((client, column, amount) for (client, column), amount in amounts if amount > 0)
        self.unserved = self._program.unserved
        return self._program.least_s, self._program.prices_s


class _Program:
    def __init__(self, rows: Rows, penalty_s: float) -> None:
        self._solver: Any = pywraplp.Solver.CreateSolver("GLOP")
        self._solver.SetSolverSpecificParametersAsString("use_preprocessing:false")
        self._parameters = pywraplp.MPSolverParameters()
        self._parameters.SetIntegerParam(self._parameters.INCREMENTALITY, self._parameters.INCREMENTALITY_ON)
        infinity = self._solver.infinity()
        self._constraints = [self._solver.Constraint(-infinity, 0.0) for _ in range(rows.count)]
        self._tied = rows.count
        self._constraints += [self._solver.Constraint(float(count), float(count)) for count in rows.sessions]
        self._unserved = [self._variable(penalty_s, [(rows.count + c, 1.0)]) for c in range(rows.sessions.size)]
        self._columns: list[Any] = []
        self._add_sizes(rows)

    def add(self, cost_s: float, terms: Terms) -> None:
        self._columns.append(self._variable(cost_s, terms))

    def solve(self) -> bool:
        optimal: bool = self._solver.Solve(self._parameters) == pywraplp.Solver.OPTIMAL
        return optimal

    @property
    def least_s(self) -> float:
        return float(self._solver.Objective().Value())

    @property
    def prices_s(self) -> Floats:
        return np.maximum([-row.dual_value() for row in self._constraints[: self._tied]], 0.0)

    @property
    def amounts(self) -> list[float]:
        return [float(variable.solution_value()) for variable in self._columns]

    @property
    def unserved(self) -> float:
        return sum(float(variable.solution_value()) for variable in self._unserved)

    def _variable(self, cost_s: float, terms: Terms) -> Any:
        variable = self._solver.NumVar(0.0, self._solver.infinity(), "")
        self._solver.Objective().SetCoefficient(variable, cost_s)
        for row, coefficient in terms:
            self._constraints[row].SetCoefficient(variable, coefficient)
        return variable

    def _add_sizes(self, rows: Rows) -> None:
        """Which size a server has; it may have several in part, together one."""
        width = rows.count // rows.num_servers
        for server in range(rows.num_servers):
            self._constraints.append(self._solver.Constraint(-self._solver.infinity(), 1.0))
            for offers in rows.offers(server):
                mine = np.flatnonzero(offers).tolist()
                terms = [(server * width + row, -float(offers[row])) for row in mine]
                self._variable(0.0, [(len(self._constraints) - 1, 1.0), *terms])
