"""Lower bounds from paths that may use a server again, but not twice in a row.

A price for each use of a server, given back once, makes using it twice dear (Lagrangian relaxation).
"""

import numpy as np

from geopetals.problem import Floats, Ints, OneWayDelays
from geopetals.push_bound.graph import Graph


class Relaxation:
    """The least that is still to come, by dynamic programming over (blocks left, server)."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.set_prices(np.zeros(graph.block_s.size))

    def set_prices(self, price_s: Floats) -> None:
        """The least to come for b blocks: after_s[b, j], with server j done, and entering_s[b, j], before it."""
        graph, self.price_s = self.graph, price_s
        shape = graph.num_blocks + 1, graph.block_s.size
        self.after_s, self.entering_s = np.full(shape, np.inf), np.full(shape, np.inf)
        self.after_s[0] = graph.to_client_s
        servers, level = np.arange(shape[1]), np.log2(graph.most).astype(np.int64)
        apart_s = np.full((int(level.max()) + 1, *shape), np.inf)
        """[q, b]: the least of after_s for the 2^q numbers of blocks up to b, computing up to there taken off."""
        for left in range(1, shape[0]):
            last = left - 1
            apart_s[0, last] = self.after_s[last] - graph.block_s * last
            for q in range(1, len(apart_s)):
                apart_s[q, last] = np.minimum(apart_s[q - 1, last], apart_s[q - 1, max(last - (1 << q - 1), 0)])
            # Two overlapping windows that together hold what is left after 1 to most[j] blocks.
            first = np.minimum(np.maximum(left - graph.most, 0) + (1 << level) - 1, last)
            through_s = np.minimum(apart_s[level, last, servers], apart_s[level, first, servers])
            self.entering_s[left] = through_s + graph.block_s * left + price_s
            if left < graph.num_blocks:
                self.after_s[left] = (graph.between_s + self.entering_s[left]).min(axis=1)

    def least_s(self) -> float:
        """A lower bound of the whole path."""
        return float((self.graph.from_client_s + self.entering_s[-1]).min() - self.price_s.sum())

    def path(self) -> list[int]:
        """The servers of a path that takes least_s."""
        servers: list[int] = []
        left, next_s = self.graph.num_blocks, self.graph.from_client_s
        while left:
            server = int((next_s + self.entering_s[left]).argmin())
            blocks = np.arange(1, min(left, int(self.graph.most[server])) + 1)
            left -= int(blocks[(self.graph.block_s[server] * blocks + self.after_s[left - blocks, server]).argmin()])
            servers.append(server)
            next_s = self.graph.between_s[server]
        return servers


def reusing_s(delays: OneWayDelays, block_s: Floats, most: Ints, num_blocks: int) -> float:
    """The bound without prices, for any number of servers."""
    most = np.minimum(most, num_blocks)
    done = np.arange(1, int(most.max()) + 1)[:, None]
    compute_s = np.where(done <= most, block_s * done, np.inf)
    after_s = np.full((num_blocks + 1, block_s.size), np.inf)
    after_s[0] = delays.to_client_s[:, 0]
    entering_s = after_s[0]
    for left in range(1, num_blocks + 1):
        rows = min(left, len(compute_s))
        entering_s = (compute_s[:rows] + after_s[left - rows : left][::-1]).min(axis=0)
        after_s[left] = (delays.between_s + entering_s).min(axis=1)
    return float((delays.from_client_s[0] + entering_s).min())
