"""Least times between blocks, where what an arc costs does not depend on the arc before it."""

import numpy as np

from geopetals.problem import Floats, Ints
from geopetals.routing.arcs import Arcs


class BlockPaths:
    """Boundaries between blocks are the nodes: the least over the arcs from one to another is one entry of a matrix,
    and the least times to all are the fixed point of one matrix operation.

    The iteration starts from the tree of a decision before, which mostly is still right or nearly so. The fixed point
    does not depend on that.
    """

    def __init__(self, arcs: Arcs, *, backwards: bool = False) -> None:
        """backwards: from the end to each node; nodes then count from there."""
        # Where no server ends nobody is ever, so a chain's boundaries are the nodes.
        bounds = np.unique(np.append(arcs.end, (0, arcs.num_blocks)))
        nodes = bounds.size
        self.node = np.searchsorted(bounds, np.arange(arcs.num_blocks + 1))
        """(blocks + 1,): of each block its node, if it is one."""
        first = np.diff(arcs.entry * (arcs.num_blocks + 1) + arcs.end, prepend=-1).nonzero()[0]
        self._first, stops = first, np.append(first, len(arcs))[1:]
        self._usable = np.isin(arcs.entry[first], bounds).nonzero()[0]
        first, stops = first[self._usable], stops[self._usable]
        entry, end = self.node[arcs.entry[first]], self.node[arcs.end[first]]
        if backwards:
            entry, end, self.node = nodes - 1 - end, nodes - 1 - entry, nodes - 1 - self.node
        self._cell = entry * nodes + end
        self._link_s = np.full((nodes, nodes), np.inf)
        """[p, e]: the least cost from node p to node e."""
        self.through_s = np.empty((nodes, nodes))
        """[p, e]: the least time to node e by an arc from node p."""
        self._nodes = np.arange(nodes)
        self.run = {(p, e): (a, b) for p, e, a, b in np.stack((entry, end, first, stops), axis=1).tolist()}
        """The arcs from node p to node e."""

    def root(self) -> Ints:
        """A tree to start from."""
        return np.zeros_like(self._nodes)

    def least(self, cost_s: Floats, before: Ints) -> Floats:
        """(nodes,): the least time to each. Corrects `before`, the node from which each is reached."""
        self._link_s.reshape(-1)[self._cell] = np.minimum.reduceat(cost_s, self._first)[self._usable]
        reached_s = self._along(before)
        while True:
            np.add(self._link_s, reached_s[:, None], out=self.through_s)
            nearer_s = np.minimum.reduce(self.through_s, axis=0)
            changed = (nearer_s < reached_s).nonzero()[0]
            if not changed.size:
                return reached_s
            before[changed] = self.through_s[:, changed].argmin(axis=0)
            reached_s[changed] = nearer_s[changed]

    def _along(self, before: Ints) -> Floats:
        """The time to each node on a given tree: an upper bound of the least."""
        times_s = [0.0]
        steps = zip(self._link_s[before, self._nodes].tolist()[1:], before.tolist()[1:], strict=True)
        for link_s, node in steps:
            times_s.append(times_s[node] + link_s)
        return np.array(times_s)
