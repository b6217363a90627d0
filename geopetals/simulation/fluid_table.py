"""Sessions in service as columns: one row for each session, one place for each hop of its chain.

A decision needs all of them, so columns that are read together are rows of one array: few operations, each on all.
"""

from collections.abc import Sequence

import numpy as np

from geopetals.problem import Floats, Ints

_ROWS = 64


class Table:
    """Rows are filled from 0. Places of sessions that went have no work, on one server more than there are."""

    def __init__(self, servers: int, *, work_columns: int) -> None:
        self.servers = servers
        self.row_of: dict[int, int] = {}
        self.hops = 0
        """Places in use, those of sessions that went among them."""
        self._live = 0
        self._numbers: Ints = np.zeros((3, _ROWS), dtype=np.int64)
        self._values: Floats = np.ones((6, _ROWS))
        self._name_rows()
        self.session: Ints = np.zeros(4 * _ROWS, dtype=np.int64)
        self.response_s: Floats = np.zeros(4 * _ROWS)
        self.work: Floats = np.zeros((work_columns, 4 * _ROWS))
        """(work_columns, places): what a unit takes there, as the way of sharing needs it."""
        # Of each column of work, the servers one after another: so all columns are added up at once.
        self._offsets: Ints = np.arange(work_columns)[:, None] * (servers + 1)
        self._cells: Ints = np.zeros((work_columns, 4 * _ROWS), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.row_of)

    @property
    def server(self) -> Ints:
        """(places in use,)"""
        return self._cells[0, : self.hops]

    def add(
        self,
        key: int,
        servers: Sequence[int],
        work: Sequence[Sequence[float]],
        response_s: Sequence[float],
        row_values: tuple[float, float, float, float, bool],
    ) -> None:
        """work: (work_columns, hops). row_values: links_s, unit_s, finish_s, since_s, measured."""
        row, count = len(self.row_of), len(servers)
        if row == self.key.size:
            self._grow_rows()
        if self.hops + count > self.session.size:
            self._make_room(count)
        first, last = self.hops, self.hops + count
        self.hops, self._live = last, self._live + count
        self.row_of[key] = row
        self._numbers[:, row] = key, first, count
        self._values[:, row] = *row_values, 1 / row_values[1]
        self.session[first:last] = row
        self._cells[:, first:last] = self._offsets + np.array(servers)
        self.work[:, first:last] = work
        self.response_s[first:last] = response_s

    def remove(self, key: int) -> None:
        row, last = self.row_of.pop(key), len(self.row_of)
        first, length = self._first.item(row), self._length.item(row)
        gone = slice(first, first + length)
        self._live -= length
        self._cells[:, gone] = self._offsets + self.servers
        self.session[gone] = 0
        self.work[:, gone] = 0.0
        self.response_s[gone] = 0.0
        if row != last:
            self._numbers[:, row] = self._numbers[:, last]
            self._values[:, row] = self._values[:, last]
            self.row_of[self.key.item(row)] = row
            start = self._first.item(row)
            self.session[start : start + self._length.item(row)] = row

    def by_server(self, values: Floats) -> Floats:
        """(n, J + 1): sums of the n rows of values at the places in use; n at most work_columns."""
        kinds, servers = len(values), self.servers + 1
        cells = self._cells[:kinds, : self.hops].reshape(-1)
        sums = np.bincount(cells, values.reshape(-1), minlength=kinds * servers)
        return np.asarray(sums, dtype=np.float64).reshape(kinds, servers)

    def by_session(self, values: Floats) -> Floats:
        """(rows,): sums of values at the places in use."""
        return np.asarray(np.bincount(self.session[: self.hops], values, minlength=len(self)), dtype=np.float64)

    def _name_rows(self) -> None:
        self.key, self._first, self._length = self._numbers
        self.links_s, self.unit_s, self.finish_s, self.since_s, self.measured, self.rate = self._values

    def _grow_rows(self) -> None:
        self._numbers = np.concatenate([self._numbers, np.zeros_like(self._numbers)], axis=1)
        self._values = np.concatenate([self._values, np.ones_like(self._values)], axis=1)
        self._name_rows()

    def _make_room(self, count: int) -> None:
        """Close the gaps; get twice the places if that is not half of them."""
        used = self.server < self.servers
        size = self.session.size
        while self._live + count > size // 2:
            size *= 2
        kept = np.flatnonzero(used)
        for name in ("session", "response_s", "work", "_cells"):
            column = getattr(self, name)
            longer = np.zeros((*column.shape[:-1], size), dtype=column.dtype)
            longer[..., : kept.size] = column[..., kept]
            setattr(self, name, longer)
        # Places keep their order, so each session's first moves down by the gaps before it.
        moved: Ints = np.cumsum(used) - used
        rows = len(self)
        self._first[:rows] = moved[self._first[:rows]]
        self.hops = kept.size
