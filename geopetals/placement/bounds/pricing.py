"""The cheapest way to serve one session when every use of k blocks of server j has a price: columns are position-free.

A column says which servers a session goes through and how many blocks it uses on each, not which blocks. Both searches
are dynamic programs over the number of blocks done, forward and backward, so that the least cost of a session that uses
k blocks of server j is known for all j and k at once.

* Relay: a session's cost does not depend on the order of its servers, so they are taken by index: a knapsack.
* Push: the cost depends on which server follows which. A walk may come back to a server, which no placement allows: the
  least over walks is a lower bound of that over chains.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from geopetals.problem import Floats, OneWayDelays

Column = tuple[tuple[int, int], ...]
"""(server, blocks used) of one session; for push in order."""


class Priced(Protocol):
    """The answer for one vector of prices."""

    least_s: Floats
    """(C,): the cheapest session of each client."""
    through_s: Floats
    """(C, J, K): the cheapest that uses 1..K blocks of server j; infinite if there is none."""

    def column(self, client: int, server: int, blocks: int) -> Column:
        """The session whose cost through_s tells."""
        ...


class Pricing(Protocol):
    def price(self, use_s: Floats) -> Priced:
        """use_s, (C, J, K): what using 1..K blocks costs, computing and price, for push without delays."""
        ...

    def delay_s(self, client: int, column: Column) -> float:
        """What the column costs beside use_s."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class RelayPricing:
    """Delays are part of use_s."""

    num_blocks: int

    def delay_s(self, client: int, column: Column) -> float:
        del client, column
        return 0.0

    def price(self, use_s: Floats) -> "RelayPriced":
        before_s = _fillings(use_s, self.num_blocks)
        after_s = _fillings(use_s[:, ::-1], self.num_blocks)[::-1]
        return RelayPriced(before_s, after_s, use_s)


class RelayPriced:
    """before_s[j], (C, L+1): the least cost of 0..L blocks on servers below j; after_s[j]: on servers from j."""

    def __init__(self, before_s: Floats, after_s: Floats, use_s: Floats) -> None:
        self._before_s, self._after_s, self._use_s = before_s, after_s, use_s
        clients, servers, most = use_s.shape
        blocks = before_s.shape[2] - 1
        self.least_s = np.asarray(before_s[-1, :, blocks])
        self.through_s = np.full((clients, servers, most), np.inf)
        for used in range(1, min(most, blocks) + 1):
            done, left = before_s[:-1, :, : blocks - used + 1], after_s[1:, :, blocks - used :: -1]
            self.through_s[:, :, used - 1] = (done + left[:, :, : blocks - used + 1]).min(axis=2).T
        self.through_s += use_s

    def column(self, client: int, server: int, blocks: int) -> Column:
        total = self._before_s.shape[2] - 1 - blocks
        both_s = self._before_s[server, client, : total + 1] + self._after_s[server + 1, client, total::-1]
        done = int(both_s.argmin())
        hops = [(server, blocks)]
        for other in range(server - 1, -1, -1):
            done = self._take(self._before_s, other, other + 1, client, other, done, hops)
        left = total - int(both_s.argmin())
        for other in range(server + 1, self._use_s.shape[1]):
            left = self._take(self._after_s, other + 1, other, client, other, left, hops)
        return tuple(sorted(hops))

    def _take(
        self,
        table_s: Floats,
        without: int,
        within: int,
        client: int,
        server: int,
        blocks: int,
        hops: list[tuple[int, int]],
    ) -> int:
        """The blocks left once the server's share, noted in hops, is taken from `blocks`."""
        if not blocks or table_s[without, client, blocks] == table_s[within, client, blocks]:
            return blocks
        span = min(self._use_s.shape[2], blocks)
        filled_s = table_s[without, client, blocks - span : blocks][::-1] + self._use_s[client, server, :span]
        used = int(filled_s.argmin()) + 1
        hops.append((server, used))
        return blocks - used


def _fillings(use_s: Floats, num_blocks: int) -> Floats:
    """(J+1, C, L+1): the least cost of 0..L blocks on the first 0..J servers."""
    clients, servers, most = use_s.shape
    table_s = np.full((servers + 1, clients, num_blocks + 1), np.inf)
    table_s[0, :, 0] = 0.0
    padded_s = np.full((clients, most + num_blocks + 1), np.inf)
    source = most + np.arange(num_blocks + 1)[:, None] - np.arange(1, most + 1)
    for server in range(servers):
        padded_s[:, most:] = table_s[server]
        with_s = (padded_s[:, source] + use_s[:, server, None, :]).min(axis=2)
        np.minimum(table_s[server], with_s, out=table_s[server + 1])
    return table_s


@dataclass(frozen=True, slots=True, eq=False)
class PushPricing:
    """delays: those of a whole session, the diagonal of between_s infinite."""

    num_blocks: int
    delays: OneWayDelays

    def delay_s(self, client: int, column: Column) -> float:
        servers = [server for server, _ in column]
        between_s = float(self.delays.between_s[servers[:-1], servers[1:]].sum())
        first_s, last_s = self.delays.from_client_s[client, servers[0]], self.delays.to_client_s[servers[-1], client]
        return float(first_s) + between_s + float(last_s)

    def price(self, use_s: Floats) -> "PushPriced":
        blocks, delays = self.num_blocks, self.delays
        entering_s = _walks(use_s, delays.from_client_s, delays.between_s, blocks)
        leaving_s = _walks(use_s, delays.to_client_s.T, delays.between_s.T, blocks)
        return PushPriced(entering_s, leaving_s, use_s, delays)


class PushPriced:
    """entering_s[l], (C, J): the least cost to stand before server j with l blocks done; leaving_s[l]: the least cost
    from when j is left with l blocks still to do."""

    def __init__(self, entering_s: Floats, leaving_s: Floats, use_s: Floats, delays: OneWayDelays) -> None:
        self._entering_s, self._leaving_s, self._use_s, self._delays = entering_s, leaving_s, use_s, delays
        blocks = entering_s.shape[0] - 1
        self.through_s = np.full(use_s.shape, np.inf)
        for used in range(1, min(use_s.shape[2], blocks) + 1):
            both_s = entering_s[: blocks - used + 1] + leaving_s[blocks - used :: -1][: blocks - used + 1]
            self.through_s[:, :, used - 1] = both_s.min(axis=0)
        self.through_s += use_s
        self.least_s = self.through_s.min(axis=(1, 2))

    def column(self, client: int, server: int, blocks: int) -> Column:
        total = self._entering_s.shape[0] - 1 - blocks
        both_s = self._entering_s[: total + 1, client, server] + self._leaving_s[total::-1, client, server]
        done = int(both_s.argmin())
        between_s = self._delays.between_s
        head = self._walk(self._entering_s, between_s, client, server, done)
        tail = self._walk(self._leaving_s, between_s.T, client, server, total - done)
        return (*head[::-1], (server, blocks), *tail)

    def _walk(self, table_s: Floats, between_s: Floats, client: int, server: int, blocks: int) -> list[tuple[int, int]]:
        """The servers met when the table is followed to where no blocks are left."""
        hops = []
        while blocks:
            span = min(self._use_s.shape[2], blocks)
            steps_s = table_s[blocks - span : blocks, client][::-1].T + self._use_s[client, :, :span]
            steps_s = steps_s + between_s[:, server, None]
            server, used = (int(index) for index in np.unravel_index(int(steps_s.argmin()), steps_s.shape))
            hops.append((server, used + 1))
            blocks -= used + 1
        return hops


def _walks(use_s: Floats, first_s: Floats, between_s: Floats, num_blocks: int) -> Floats:
    """(L+1, C, J): the least cost to stand before each server with 0..L blocks done."""
    clients, servers, most = use_s.shape
    table_s = np.full((num_blocks + 1, clients, servers), np.inf)
    table_s[0] = first_s
    use_s = use_s.transpose(2, 0, 1)
    for done in range(1, num_blocks + 1):
        span = min(most, done)
        left_s = (table_s[done - span : done][::-1] + use_s[:span]).min(axis=0)
        table_s[done] = (left_s[:, :, None] + between_s).min(axis=1)
    return table_s
