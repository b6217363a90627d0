"""The chains that a placement allows, as arcs: (server, block at which it is entered). A server is left at its end.

A server with m blocks has m arcs, so a swarm of J servers has J·m of them, while the graph whose nodes are servers has
of the order of J² edges. Both graphs find the cheapest chain from block 0 to the last for one client, given what each
arc costs beyond its hop (waiting, penalties; infinite: not allowed).
"""

from typing import Protocol

import numpy as np

from geopetals.errors import UnsupportedInput
from geopetals.plan import Chain, Placement
from geopetals.problem import Floats, Ints
from geopetals.routing.arcs import Arcs, no_chain
from geopetals.routing.block_paths import BlockPaths
from geopetals.routing.push_graph import PushGraph
from geopetals.timing import HopCosts

__all__ = ["Arcs", "Graph", "PushGraph", "RelayGraph", "build_graph", "no_chain"]

_KEPT_CLIENTS = 256
"""Clients whose hop costs are kept: 8 bytes for each arc and client."""


class Graph(Protocol):
    """Finds the cheapest chain; `extra_s` has one entry for each arc."""

    arcs: Arcs

    def cheapest(self, client: int, extra_s: Floats | None = None) -> tuple[float, Chain]:
        """Its cost, extras included, and the chain. Raises NoChain."""
        ...

    def arc_costs(self, client: int) -> Floats:
        """(arcs,): for relay, what each hop costs the client; for push, its computing."""
        ...


def build_graph(placement: Placement, costs: HopCosts) -> Graph:
    """The graph for relay or for push, whichever the costs are for."""
    arcs = Arcs(placement)
    return RelayGraph(arcs, costs) if costs.push is None else PushGraph(arcs, costs, costs.push)


class RelayGraph:
    """A hop's cost does not depend on the hop before it, so blocks are the nodes, see BlockPaths.

    Of equal chains, the one with the lowest entry, then the lowest server, is taken, whatever was decided before.
    """

    def __init__(self, arcs: Arcs, costs: HopCosts) -> None:
        if costs.relay_s is None:
            raise UnsupportedInput("Relay needs the round trips between clients and servers: give relay delays.")
        self.arcs = arcs
        self._relay_s = costs.relay_s
        self._block_s = costs.block_s
        self._arc_costs: dict[int, Floats] = {}
        self._trees: dict[int, Ints] = {}
        self._cost_s = np.empty(len(arcs))
        self._paths = BlockPaths(arcs)

    def arc_costs(self, client: int) -> Floats:
        if client not in self._arc_costs:
            if len(self._arc_costs) == _KEPT_CLIENTS:
                del self._arc_costs[next(iter(self._arc_costs))]
            server = self.arcs.server
            self._arc_costs[client] = self._relay_s[client, server] + self._block_s[server] * self.arcs.blocks
        return self._arc_costs[client]

    def cheapest(self, client: int, extra_s: Floats | None = None) -> tuple[float, Chain]:
        if not len(self.arcs):
            raise no_chain(self.arcs, extra_s)
        cost_s = np.add(self.arc_costs(client), 0.0 if extra_s is None else extra_s, out=self._cost_s)
        if client not in self._trees:
            self._trees[client] = self._paths.root()
        reached_s = self._paths.least(cost_s, self._trees[client])
        if reached_s[-1] == np.inf:
            raise no_chain(self.arcs, extra_s)
        return float(reached_s[-1]), self._walk_back(cost_s)

    def _walk_back(self, cost_s: Floats) -> Chain:
        arcs, end = [], int(self._paths.node[-1])
        while end:
            entry = int(self._paths.through_s[:, end].argmin())
            low, high = self._paths.run[entry, end]
            arcs.append(low + int(cost_s[low:high].argmin()))
            end = entry
        return self.arcs.chain(arcs[::-1])
