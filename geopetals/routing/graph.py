"""The chains that a placement allows, as arcs: (server, block at which it is entered). A server is left at its end.

A server with m blocks has m arcs, so a swarm of J servers has J·m of them, while the graph whose nodes are servers has
of the order of J² edges. Both graphs find the cheapest chain from block 0 to the last for one client, given what each
arc costs beyond its hop (waiting, penalties; infinite: not allowed).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from geopetals.errors import NoChain, UnsupportedInput
from geopetals.plan import Chain, Hop, Placement, spans_of
from geopetals.problem import Floats, Ints, OneWayDelays
from geopetals.timing import HopCosts

_KEPT_CLIENTS = 256
"""Clients whose hop costs are kept: 8 bytes for each arc and client."""


class Arcs:
    """All arcs of a placement, sorted by (entry, end, server)."""

    def __init__(self, placement: Placement) -> None:
        held = placement.held
        server = np.repeat(np.arange(len(placement)), held)
        first = np.cumsum(held) - held
        entry = placement.starts[server] + np.arange(server.size) - first[server]
        order = np.lexsort((server, placement.ends[server], entry))
        self.num_blocks = placement.num_blocks
        self.server: Ints = server[order]
        self.entry: Ints = entry[order]
        self.end: Ints = placement.ends[self.server]
        self.blocks: Ints = self.end - self.entry
        position = np.empty_like(order)
        position[order] = np.arange(order.size)
        # Reversed, since the arc that uses one block is the one entered last.
        self.of_server = [position[low : low + count][::-1] for low, count in zip(first, held, strict=True)]
        """For each server its arcs by how many blocks they use: 1, 2, .., all."""
        self._hops: dict[int, Hop] = {}

    def __len__(self) -> int:
        return self.server.size

    def chain(self, arcs: Sequence[int]) -> Chain:
        return Chain(tuple([self._hop(arc) for arc in arcs]))

    def _hop(self, arc: int) -> Hop:
        if arc not in self._hops:
            self._hops[arc] = Hop(int(self.server[arc]), int(self.entry[arc]), int(self.end[arc]))
        return self._hops[arc]


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
    """A hop's cost does not depend on the hop before it, so blocks are the nodes: the least over the arcs from block p
    to block e is one entry of a matrix, and the least times to all blocks are the fixed point of one matrix operation.

    The iteration starts from the tree of cheapest chains of the client's decision before, which mostly is still right
    or nearly so. Neither the fixed point nor the chain read from it depends on that: of equal ones, the chain with the
    lowest entry, then the lowest server, is taken.
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
        nodes = arcs.num_blocks + 1
        cell = arcs.entry * nodes + arcs.end
        self._first = np.flatnonzero(np.diff(cell, prepend=-1))
        self._cell = cell[self._first]
        self._link_s = np.full((nodes, nodes), np.inf)
        """[p, e]: the least cost from block p to block e."""
        self._through_s = np.empty_like(self._link_s)
        stops = np.append(self._first, len(arcs))[1:]
        self._run = {int(c): (int(a), int(b)) for c, a, b in zip(self._cell, self._first, stops, strict=True)}
        self._blocks = np.arange(nodes)

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
        self._link_s.reshape(-1)[self._cell] = np.minimum.reduceat(cost_s, self._first)
        if client not in self._trees:
            self._trees[client] = np.zeros_like(self._blocks)
        reached_s = self._least(self._trees[client])
        if reached_s[-1] == np.inf:
            raise no_chain(self.arcs, extra_s)
        return float(reached_s[-1]), self._walk_back(cost_s)

    def _least(self, before: Ints) -> Floats:
        """The least time to each block. Corrects `before`, the block from which each is reached."""
        reached_s = self._along(before)
        while True:
            np.add(self._link_s, reached_s[:, None], out=self._through_s)
            nearer_s = self._through_s.min(axis=0)
            changed = np.flatnonzero(nearer_s < reached_s)
            if not changed.size:
                return reached_s
            before[changed] = self._through_s[:, changed].argmin(axis=0)
            reached_s[changed] = nearer_s[changed]

    def _along(self, before: Ints) -> Floats:
        """The time to each block on a given tree: an upper bound of the least."""
        times_s = [0.0]
        steps = zip(self._link_s[before, self._blocks].tolist()[1:], before.tolist()[1:], strict=True)
        for link_s, block in steps:
            times_s.append(times_s[block] + link_s)
        return np.array(times_s)

    def _walk_back(self, cost_s: Floats) -> Chain:
        arcs, end = [], self.arcs.num_blocks
        while end:
            entry = int(self._through_s[:, end].argmin())
            low, high = self._run[entry * (self.arcs.num_blocks + 1) + end]
            arcs.append(low + int(cost_s[low:high].argmin()))
            end = entry
        return self.arcs.chain(arcs[::-1])


class PushGraph:
    """A hop's delay depends on the server before it: servers that end at a block, times servers entered there."""

    def __init__(self, arcs: Arcs, costs: HopCosts, delays: OneWayDelays) -> None:
        self.arcs = arcs
        self._delays = delays
        self._compute_s = costs.block_s[arcs.server] * arcs.blocks
        self._entered = [np.flatnonzero(arcs.entry == block) for block in range(arcs.num_blocks)]
        one_block = np.flatnonzero(arcs.blocks == 1)
        self._ending = [arcs.server[one_block[arcs.end[one_block] == end]] for end in range(arcs.num_blocks + 1)]
        self._links = [
            delays.between_s[np.ix_(ending, arcs.server[entered])]
            for ending, entered in zip(self._ending[:-1], self._entered, strict=True)
        ]

    def arc_costs(self, client: int) -> Floats:
        del client
        return self._compute_s

    def cheapest(self, client: int, extra_s: Floats | None = None) -> tuple[float, Chain]:
        arc_s = self._compute_s if extra_s is None else self._compute_s + extra_s
        best_s = np.full(self._delays.from_client_s.shape[1], np.inf)
        best_arc = np.full(best_s.size, -1)
        before = np.full(len(self.arcs), -1)
        for block, entered in enumerate(self._entered):
            if not entered.size:
                continue
            reached_s = self._reach(block, client, best_s, entered, before) + arc_s[entered]
            servers = self.arcs.server[entered]
            better = reached_s < best_s[servers]
            best_s[servers[better]] = reached_s[better]
            best_arc[servers[better]] = entered[better]
        last = self._ending[-1]
        final_s = best_s[last] + self._delays.to_client_s[last, client]
        if not last.size or not np.isfinite(final_s.min()):
            raise no_chain(self.arcs, extra_s)
        return float(final_s.min()), self._walk_back(int(last[final_s.argmin()]), best_arc, before)

    def _reach(self, block: int, client: int, best_s: Floats, entered: Ints, before: Ints) -> Floats:
        """The least time to stand before each arc entered at this block; notes the server that leads there."""
        if block == 0:
            return np.asarray(self._delays.from_client_s[client, self.arcs.server[entered]])
        ending = self._ending[block]
        if not ending.size:
            return np.full(entered.size, np.inf)
        through_s = best_s[ending, None] + self._links[block]
        chosen = through_s.argmin(axis=0)
        before[entered] = ending[chosen]
        return np.asarray(through_s[chosen, np.arange(entered.size)])

    def _walk_back(self, server: int, best_arc: Ints, before: Ints) -> Chain:
        arcs = []
        while server >= 0:
            arcs.append(int(best_arc[server]))
            server = int(before[arcs[-1]])
        return self.arcs.chain(arcs[::-1])


def no_chain(arcs: Arcs, extra_s: Floats | None) -> NoChain:
    """The error that names the blocks without a server that may be used."""
    usable = np.ones(len(arcs), dtype=bool) if extra_s is None else np.isfinite(extra_s)
    missing = np.setdiff1d(np.arange(arcs.num_blocks), arcs.entry[usable])
    if not missing.size:
        return NoChain("The servers hold all blocks, but some cannot be reached: mend the links.")
    names = ", ".join(str(span) for span in spans_of(missing.tolist()))
    return NoChain(f"Blocks {names} of {arcs.num_blocks} have no server that may be used: add a server for them.")
