"""Lower bounds from paths that may use a server again, once those that remember it are left behind.

A path remembers a server that it used for as long as all servers after it have it on their lists (the ng-paths of
Baldacci, Mingozzi and Roberti, Operations Research 59(5), 2011). With empty lists it may use any server again but the
last. A price for each use of a server, given back once, makes using it twice dear (Lagrangian relaxation).
"""

from collections.abc import Sequence

import numpy as np

from geopetals.problem import Floats, Ints, OneWayDelays
from geopetals.push_bound.graph import Graph

Lists = Sequence[Sequence[int]]
"""The servers that each server remembers, other than itself."""


class Relaxation:
    """The least that is still to come, by dynamic programming over (blocks left, state).

    A state is a server and a subset of its list: those that the path remembers. There are sum_j 2^len(lists[j]).
    """

    def __init__(self, graph: Graph, lists: Lists) -> None:
        self.graph, self.lists = graph, lists
        servers, lengths = np.arange(len(lists)), np.array([len(each) for each in lists])
        self._listed = np.array([[*each, *[j] * (lengths.max() - len(each))] for j, each in enumerate(lists)], np.int64)
        self._first = np.concatenate([[0], np.cumsum(1 << lengths)[:-1]])
        self.server = np.repeat(servers, 1 << lengths)
        memory = np.arange(self.server.size) - self._first[self.server]
        sets = 1 << self.server
        for place, listed in enumerate(self._listed.T):
            sets |= (memory >> place & 1) << listed[self.server]
        self.next_s = np.where(sets[:, None] >> servers & 1, np.inf, graph.between_s[self.server])
        """(states, J): the delay to each next server that is not remembered."""
        self.next_state = self.state(sets[:, None], servers)
        """(states, J): where that leads to."""
        self.set_prices(np.zeros(servers.size))

    def state(self, sets: Ints, servers: Ints) -> Ints:
        """At each of `servers`, when those in its set, of which it is none, came before it."""
        memory = np.zeros(np.broadcast_shapes(sets.shape, servers.shape), dtype=np.int64)
        for place, listed in enumerate(self._listed.T):
            memory |= (sets >> listed[servers] & (listed != np.arange(len(listed)))[servers]) << place
        return self._first[servers] + memory

    def set_prices(self, price_s: Floats) -> None:
        """The least to come for b blocks: after_s[b, state], with its server done, and entering_s[b, state], before."""
        graph, self.price_s = self.graph, price_s
        shape = graph.num_blocks + 1, self.server.size
        self.after_s, self.entering_s = np.full(shape, np.inf), np.full(shape, np.inf)
        self.after_s[0] = graph.to_client_s[self.server]
        states, most, block_s = np.arange(shape[1]), graph.most[self.server], graph.block_s[self.server]
        level = np.log2(most).astype(np.int64)
        apart_s = np.full((int(level.max()) + 1, *shape), np.inf)
        """[q, b]: the least of after_s for the 2^q numbers of blocks up to b, computing up to there taken off."""
        for left in range(1, shape[0]):
            last = left - 1
            apart_s[0, last] = self.after_s[last] - block_s * last
            for q in range(1, len(apart_s)):
                apart_s[q, last] = np.minimum(apart_s[q - 1, last], apart_s[q - 1, max(last - (1 << q - 1), 0)])
            # Two overlapping windows that together hold what is left after 1 to most[j] blocks.
            first = np.minimum(np.maximum(left - most, 0) + (1 << level) - 1, last)
            through_s = np.minimum(apart_s[level, last, states], apart_s[level, first, states])
            self.entering_s[left] = through_s + block_s * left + price_s[self.server]
            if left < graph.num_blocks:
                self.after_s[left] = (self.next_s + self.entering_s[left][self.next_state]).min(axis=1)

    def least_s(self) -> float:
        """A lower bound of the whole path."""
        return float((self.graph.from_client_s + self.entering_s[-1, self._first]).min() - self.price_s.sum())

    def path(self) -> list[int]:
        """The servers of a path that takes least_s."""
        servers: list[int] = []
        left, next_s, next_state = self.graph.num_blocks, self.graph.from_client_s, self._first
        while left:
            state = int(next_state[(next_s + self.entering_s[left, next_state]).argmin()])
            server = int(self.server[state])
            blocks = np.arange(1, min(left, int(self.graph.most[server])) + 1)
            to_come_s = self.graph.block_s[server] * blocks + self.after_s[left - blocks, state]
            left -= int(blocks[to_come_s.argmin()])
            servers.append(server)
            next_s, next_state = self.next_s[state], self.next_state[state]
        return servers


def reusing_s(delays: OneWayDelays, block_s: Floats, most: Ints, num_blocks: int) -> float:
    """The bound with empty lists and no prices, for any number of servers."""
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
