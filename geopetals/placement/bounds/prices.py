"""The rows that tie sessions to what servers hold, their prices, and the lower bound that any prices give.

A session that uses k blocks of server j counts in these rows; what the server may carry with m blocks is on the right:

| row           | counts     | at most                                     | why                                    |
| ------------- | ---------- | ------------------------------------------- | -------------------------------------- |
| (j, v) cache  | k, if k>=v | slots_j(m), if m >= v                       | caches of the sessions that go so deep |
| (j, v) whole  | floor(k/v) | min(floor(slots_j(m)/v), R floor(m/v))      | the same, rounded (Chvatal-Gomory)     |
| (j, c) client | 1          | min(R_c, slots_j(m)), if m >= 1             | a server without blocks serves nobody  |

For prices y >= 0 every placement and routing costs at least
    sum_c R_c min_chain (cost + y counts) - sum_j max(0, max_m y at_most).
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from geopetals.placement.bounds.pricing import Column
from geopetals.placement.bounds.sizes import Sizes
from geopetals.problem import Floats, Ints

_ROUNDED_SESSIONS = 64
"""With more sessions at once, rounding hardly matters, and the whole rows cost more time than they gain."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """All rows, numbered: cache rows (j, 1..K), whole rows (j, 1..K), client rows (j, c)."""

    sizes: Sizes
    sessions: Ints
    """(C,)"""
    active: NDArray[np.bool_] = field(init=False)
    """(J, 2K + C): the others are left empty. Where no size lies between two levels the lower one's row is enough."""

    def __post_init__(self) -> None:
        most = self.sizes.most
        active = np.zeros((self.num_servers, 2 * most + self.sessions.size), dtype=bool)
        for server, sizes in enumerate(self.sizes.sizes):
            active[server, 0] = True
            active[server, sizes[sizes < most]] = True
        active[:, most + 1 : 2 * most] = self.sessions.sum() <= _ROUNDED_SESSIONS
        active[:, 2 * most :] = True
        object.__setattr__(self, "active", active)

    @property
    def num_servers(self) -> int:
        return len(self.sizes.sizes)

    @property
    def count(self) -> int:
        return self.num_servers * (2 * self.sizes.most + self.sessions.size)

    def offers(self, server: int) -> Floats:
        """(sizes, 2K + C): the right sides of the server's rows, for each of its sizes."""
        sizes, slots = self.sizes.sizes[server][:, None], self.sizes.slots[server][:, None]
        levels = np.arange(1, self.sizes.most + 1)
        held = sizes >= levels
        total = int(self.sessions.sum())
        cache = np.where(held, np.minimum(slots, total * sizes), 0)
        whole = np.where(held, np.minimum(slots // levels, total * (sizes // levels)), 0)
        offers = np.hstack([cache, whole, np.minimum(self.sessions, slots)])
        return np.where(self.active[server], offers, 0).astype(np.float64)

    def counts(self, client: int, column: Column) -> list[tuple[int, int]]:
        """(row, count) of a session; rows may occur twice where a server does."""
        most, width = self.sizes.most, 2 * self.sizes.most + self.sessions.size
        found = []
        for server, blocks in column:
            first = server * width
            found += [(first + level, blocks) for level in range(blocks)]
            found += [(first + most + level, blocks // (level + 1)) for level in range(blocks)]
            found.append((first + 2 * most + client, 1))
        kept = self.active.reshape(-1)
        return [(row, count) for row, count in found if kept[row]]

    def use_s(self, prices_s: Floats) -> Floats:
        """(C, J, K): what using 1..K blocks costs a session at these prices, (count,)."""
        most = self.sizes.most
        by_server = np.where(self.active, prices_s.reshape(self.num_servers, -1), 0.0)
        blocks = np.arange(1, most + 1)
        cache_s = np.cumsum(by_server[:, :most], axis=1) * blocks
        whole_s = by_server[:, most : 2 * most] @ (blocks[None, :] // blocks[:, None])
        return np.asarray((cache_s + whole_s)[None] + by_server[:, 2 * most :].T[:, :, None])

    def worth_s(self, prices_s: Floats) -> list[Floats]:
        """For each server what each of its sizes is worth at these prices."""
        by_server = prices_s.reshape(self.num_servers, -1)
        return [self.offers(server) @ by_server[server] for server in range(self.num_servers)]
