"""The cheapest path of one client through servers that push, each used at most once: exact for few servers.

Without "at most once" the cheapest path is a dynamic program over (server, blocks left), and what it gives is a lower
bound. It is raised by prices for using a server, paid at each use and given back once (Lagrangian relaxation, improved
by subgradient steps). With the prices as estimate, up to 25 servers are searched by A*: the open path with the least
estimate is extended until one is complete. If that takes too long, the least estimate still open is a lower bound.
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geopetals.problem import Floats, Ints, OneWayDelays

_EXACT_SERVERS = 25
_SEARCH_STEPS = 2_000
_PRICE_STEPS = 80
_BEAM = 50

Path = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PathBound:
    """No path takes less than least_s."""

    least_s: float
    reached_s: float
    """The time of the best path found: least_s where that is exact; infinite if none was looked for."""
    path: Path
    """(server, blocks) of that path, in order."""


def cheapest_path(delays: OneWayDelays, block_s: Floats, most: Ints, num_blocks: int) -> PathBound:
    """For the one client of `delays`; server j takes 1 to most[j] blocks. The diagonal of between_s must be inf."""
    graph = _Priced(delays, block_s, most, num_blocks)
    if block_s.size > _EXACT_SERVERS:
        return PathBound(least_s=graph.least_s(), reached_s=float("inf"), path=())
    graph.improve_prices()
    return _search(graph)


class _Priced:
    """Estimates of what is still to come, with a price on every use of a server."""

    def __init__(self, delays: OneWayDelays, block_s: Floats, most: Ints, num_blocks: int) -> None:
        self.from_client_s = delays.from_client_s[0]
        self.between_s = delays.between_s
        self.to_client_s = delays.to_client_s[:, 0]
        self.most = np.minimum(most, num_blocks)
        self.num_blocks = num_blocks
        self.done = np.arange(1, int(self.most.max()) + 1)[:, None]
        self.block_s = block_s
        self.compute_s = np.where(self.done <= self.most, block_s * self.done, np.inf)
        """[k - 1, j]: k blocks on server j."""
        self.set_prices(np.zeros(block_s.size))

    def set_prices(self, price_s: Floats) -> None:
        """after_s[b, j], when j is done, and entering_s[b, j], as j is entered: the least to come for b blocks."""
        self.price_s = price_s
        self.after_s = np.full((self.num_blocks + 1, price_s.size), np.inf)
        self.entering_s = np.full_like(self.after_s, np.inf)
        self.after_s[0] = self.to_client_s
        for left in range(1, self.num_blocks + 1):
            rows = min(left, len(self.compute_s))
            through_s = self.compute_s[:rows] + self.after_s[left - rows : left][::-1]
            self.entering_s[left] = through_s.min(axis=0) + price_s
            self.after_s[left] = (self.between_s + self.entering_s[left]).min(axis=1)

    def least_s(self) -> float:
        """A lower bound of the whole path."""
        return float((self.from_client_s + self.entering_s[-1]).min() - self.price_s.sum())

    def uses(self) -> Ints:
        """(J,): how often the cheapest path under the prices uses each server."""
        counts = np.zeros(self.price_s.size, dtype=np.int64)
        left, delay_s = self.num_blocks, self.from_client_s
        while left:
            server = int((delay_s + self.entering_s[left]).argmin())
            rows = min(left, len(self.compute_s))
            through_s = self.compute_s[:rows, server] + self.after_s[left - rows : left, server][::-1]
            left -= int(through_s.argmin()) + 1
            counts[server] += 1
            delay_s = self.between_s[server]
        return counts

    def improve_prices(self) -> None:
        """Raise the price of servers used more than once, lower that of those not used, by shrinking steps."""
        best_s, best_price_s = self.least_s(), self.price_s
        step_s = 0.1 * best_s
        for _ in range(_PRICE_STEPS):
            slope = self.uses() - 1
            if not slope.any() or not step_s:
                break
            self.set_prices(np.maximum(self.price_s + step_s * slope / np.sqrt((slope**2).sum()), 0.0))
            if self.least_s() > best_s:
                best_s, best_price_s = self.least_s(), self.price_s
            step_s *= 0.95
        self.set_prices(best_price_s)

    def extensions(self, path: Path, cost_s: float, left: int) -> tuple[Floats, Floats]:
        """For each (blocks - 1, server) that may come next: the cost then, and the estimate of the complete path."""
        visited = [server for server, _ in path]
        delay_s = self.between_s[visited[-1]].copy() if path else self.from_client_s.copy()
        delay_s[visited] = np.inf
        rows = min(left, len(self.compute_s))
        next_s = cost_s + delay_s + self.compute_s[:rows]
        next_s[self._wasteful(path, rows)] = np.inf
        returned_s = self.price_s.sum() - self.price_s[visited].sum() - self.price_s
        return next_s, next_s + self.after_s[left - rows : left][::-1] - returned_s

    def _wasteful(self, path: Path, rows: int) -> NDArray[np.bool_]:
        """(rows, J): choices by which a block would be on one server that a faster one of the path could have taken."""
        fastest_with_room = min((self.block_s[j] for j, blocks in path if blocks < self.most[j]), default=np.inf)
        slowest_to_relieve = max((self.block_s[j] for j, blocks in path if blocks > 1), default=-np.inf)
        has_room = (self.done[:rows] < self.most) & (self.block_s < slowest_to_relieve)
        return np.asarray(has_room | ((self.done[:rows] > 1) & (self.block_s > fastest_with_room)))


def _beam(graph: _Priced) -> tuple[float, Path]:
    """A good complete path, to prune by."""
    best: tuple[float, Path] = (float("inf"), ())
    front: list[tuple[float, float, int, Path]] = [(0.0, 0.0, graph.num_blocks, ())]
    while front:
        following: list[tuple[float, float, int, Path]] = []
        for _, cost_s, left, path in front:
            next_s, least_s = graph.extensions(path, cost_s, left)
            order = np.argsort(least_s, axis=None)[:_BEAM]
            for blocks, server in zip(*np.unravel_index(order, least_s.shape), strict=True):
                estimate_s, longer = float(least_s[blocks, server]), (*path, (int(server), int(blocks) + 1))
                if estimate_s >= best[0]:
                    break
                if blocks + 1 == left:
                    total_s = float(next_s[blocks, server] + graph.to_client_s[server])
                    best = min(best, (total_s, longer))
                else:
                    following.append((estimate_s, float(next_s[blocks, server]), left - int(blocks) - 1, longer))
        front = heapq.nsmallest(_BEAM, following)
    return best


def _search(graph: _Priced) -> PathBound:
    best_s, best_path = _beam(graph)
    seen: dict[tuple[frozenset[int], int, int], float] = {}
    heap: list[tuple[float, float, int, Path]] = [(graph.least_s(), 0.0, graph.num_blocks, ())]
    for _ in range(_SEARCH_STEPS):
        if not heap or heap[0][0] >= best_s * (1 - 1e-12):
            return PathBound(least_s=best_s, reached_s=best_s, path=best_path)
        _, cost_s, left, path = heapq.heappop(heap)
        visited = frozenset(server for server, _ in path)
        next_s, least_s = graph.extensions(path, cost_s, left)
        for row, server in zip(*(axis.tolist() for axis in np.nonzero(least_s < best_s)), strict=True):
            longer, arrived_s, rest = (*path, (server, row + 1)), float(next_s[row, server]), left - row - 1
            if not rest:
                best_s, best_path = min((best_s, best_path), (arrived_s + float(graph.to_client_s[server]), longer))
                continue
            key = (visited | {server}, server, rest)
            if arrived_s < seen.get(key, float("inf")):
                seen[key] = arrived_s
                heapq.heappush(heap, (float(least_s[row, server]), arrived_s, rest, longer))
    return PathBound(least_s=min(heap[0][0], best_s) if heap else best_s, reached_s=best_s, path=best_path)
