"""Sessions that share servers' compute, as a fluid: each advances at the rate of its present time per token.

A session's unit of progress (its prefill, then each decode step) takes its links' delays and, on each server of its
chain, a response time R that depends on the others there. The sessions are a closed
network (each has one step under way), so rates and responses are found together, by the approximate mean value analysis
of Bard and Schweitzer: a step finds on a server what the others keep there on average. sharing.py has the responses;
the tests compare them with a simulation of every single step. A session alone has exactly the times of timing.py.

The rates are brought up to date when as many sessions came, went or changed from prefill to decode since the last time
as are one in fifty of those in progress: by Little's law nobody's rate is older than a fiftieth of a session.
"""

from collections.abc import Sequence

import numpy as np

from geopetals.errors import UnsupportedInput
from geopetals.problem import Floats, Problem
from geopetals.simulation.fluid_table import Table
from geopetals.simulation.histogram import Histogram
from geopetals.simulation.sharing import Batched, OneByOne, Sharing

_STALE = 0.02
_DAMPING = 0.7
_FEW = 20
_SHORTEST_S = 1e-9


class Fluid:
    """Units in progress, one for each session; `now` must not go backwards."""

    def __init__(self, problem: Problem, *, batched: bool) -> None:
        if problem.contention is None:
            raise UnsupportedInput("Contention needs the servers' times for several sessions: give them, or none.")
        self._sharing: Sharing = Batched(problem.contention) if batched else OneByOne(problem.num_servers)
        self._table = Table(problem.num_servers, work_columns=self._sharing.work_columns)
        self._first: int | None = None
        """The row whose units are done next, once it is known."""
        self.intervals = Histogram()
        """Times per unit of measured sessions, each as often as units took so long."""
        self._busy_s = np.zeros(problem.num_servers + 1)
        self._window = (0.0, float("inf"))
        self._refreshed_s = 0.0
        self._changes = 0

    def __len__(self) -> int:
        return len(self._table)

    def measure(self, start_s: float, end_s: float) -> None:
        """Time at work counts between these instants."""
        self._window = (start_s, end_s)

    def use(self) -> Floats:
        """(J,): share of that time at work."""
        low, high = self._window
        return np.asarray(self._busy_s[:-1] / max(high - low, 1e-12))

    def add(
        self,
        key: int,
        now: float,
        *,
        servers: Sequence[int],
        work: Sequence[float],
        links_s: float,
        units: float,
        decode: bool,
        measured: bool,
    ) -> None:
        """A session begins with so many units: decode steps, or one prompt.

        work: on each server of its chain, blocks if it decodes where steps are batched, else seconds.
        """
        responses_s = [self._sharing.estimate_s(j, w, decode=decode) for j, w in zip(servers, work, strict=True)]
        unit_s = max(links_s + sum(responses_s), _SHORTEST_S)
        values = (links_s, unit_s, now + units * unit_s, now, measured)
        self._table.add(key, servers, self._sharing.work(servers, work, decode=decode), responses_s, values)
        self._changed(now)

    def remove(self, key: int, now: float) -> float:
        """The session's unit is done, or given up: how many units were left of it."""
        table, row = self._table, self._table.row_of[key]
        unit_s = float(table.unit_s.item(row))
        left = max(float(table.finish_s.item(row) - now) / unit_s, 0.0)
        if table.measured.item(row):
            self.intervals.add(unit_s, (now - table.since_s.item(row)) / unit_s)
        table.remove(key)
        self._changed(now)
        return left

    def first_done_s(self) -> float:
        """When a session's units are done next; inf: never."""
        return float(self._table.finish_s.item(self._first_row())) if len(self._table) else float("inf")

    def first_done(self) -> int:
        """Whose units are done next."""
        return int(self._table.key.item(self._first_row()))

    def done_s(self, key: int) -> float:
        """When this session's units will be done, if nothing changes."""
        return float(self._table.finish_s.item(self._table.row_of[key]))

    def unit_s(self, key: int) -> float:
        """The present time per unit."""
        return float(self._table.unit_s.item(self._table.row_of[key]))

    def _first_row(self) -> int:
        if self._first is None:
            self._first = int(self._table.finish_s[: len(self._table)].argmin())
        return self._first

    def _changed(self, now: float) -> None:
        self._first = None
        self._changes += 1
        if self._changes >= _STALE * len(self._table):
            self._refresh(now)

    def _refresh(self, now: float) -> None:
        self._note(now)
        self._changes, self._first = 0, None
        table, count = self._table, len(self._table)
        if not count:
            self._sharing.rest()
            return
        unit_s, rate, finish_s = table.unit_s[:count], table.rate[:count], table.finish_s[:count]
        finish_s -= now
        np.maximum(finish_s, 0.0, out=finish_s)
        finish_s *= rate
        response_s = table.response_s[: table.hops]
        # The fewer sessions, the more each of them changes for the others.
        for _ in range(1 if count > _FEW else 3):
            change_s = self._sharing.responses_s(table)
            change_s -= response_s
            change_s *= _DAMPING
            response_s += change_s
            np.add(table.links_s[:count], table.by_session(response_s), out=unit_s)
            np.maximum(unit_s, _SHORTEST_S, out=unit_s)
            np.reciprocal(unit_s, out=rate)
        finish_s *= unit_s
        finish_s += now

    def _note(self, now: float) -> None:
        """Add what happened since the last time to the figures."""
        low, high = self._window
        length_s = min(now, high) - max(self._refreshed_s, low)
        if length_s > 0:
            self._busy_s += self._sharing.use * length_s
        self._refreshed_s = now
        table, count = self._table, len(self._table)
        if count:
            units = now - table.since_s[:count]
            units *= table.rate[:count]
            units *= table.measured[:count]
            self.intervals.add_many(table.unit_s[:count], units)
        table.since_s[:count] = now
