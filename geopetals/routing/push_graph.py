"""The cheapest chain where servers send straight to the next one."""

from itertools import pairwise

import numpy as np

from geopetals.plan import Chain
from geopetals.problem import Floats, Ints, OneWayDelays
from geopetals.routing.arcs import Arcs, no_chain
from geopetals.routing.attempts import Attempts, Found
from geopetals.routing.block_paths import BlockPaths
from geopetals.timing import HopCosts

_KEPT_CLIENTS = 256
"""Clients whose least costs through each arc are kept: 8 bytes for each arc and client."""
_FEW = 100
"""Arcs that are looked at one by one; of more, most are ruled out first."""
_NEAR = 32
"""Servers from which the search goes on; for more, all arcs at once are faster."""
_ROUNDING = 1e-9


class PushGraph:
    """A hop's delay depends on the server before it: servers that end at a block, times servers entered there.

    Few arcs can be on the cheapest chain. Where extras are small or rare: without them each arc has a least cost of all
    chains through it, and a chain at hand, the cheapest without extras or the client's last, gives a limit for that
    cost plus the arc's own extra. Else: if each server had its shortest link from any before it, blocks would be the
    nodes, and the least times from each to the end are found at once, with all extras; guided by these bounds, the
    search from the client (A*) leaves few servers. The chain found is the same as among all arcs.
    """

    def __init__(self, arcs: Arcs, costs: HopCosts, delays: OneWayDelays) -> None:
        self.arcs = arcs
        self._delays = delays
        self._compute_s = costs.block_s[arcs.server] * arcs.blocks
        one_block = np.flatnonzero(arcs.blocks == 1)
        self._ending = [arcs.server[one_block[arcs.end[one_block] == end]] for end in range(arcs.num_blocks + 1)]
        bounds = np.searchsorted(arcs.entry, np.arange(arcs.num_blocks + 1)).tolist()
        self._blocks: list[tuple[tuple[int, int], Ints, Ints | None, Floats]] = []
        """Of each block: its arcs, their servers, the servers that end there (None at the first), the links between."""
        for block, (low, high) in enumerate(pairwise(bounds)):
            servers, ending = arcs.server[low:high], self._ending[block]
            links_s = delays.between_s[np.ix_(ending, servers)]
            self._blocks.append(((low, high), servers, ending if block else None, links_s))
        self._nearest_s = self._shortest_links()
        self._paths = BlockPaths(arcs, backwards=True)
        self._tree = self._paths.root()
        self._few, self._near = Attempts(), Attempts()
        # Servers without blocks end at block 0, and nobody comes there.
        self._end = np.zeros(delays.from_client_s.shape[1], dtype=np.int64)
        self._end[arcs.server] = arcs.end
        self._end_node = self._paths.node[self._end]
        self._final = np.flatnonzero(arcs.end == arcs.num_blocks)
        self._place = {int(server): place for ending in self._ending for place, server in enumerate(ending)}
        """Of each server its row in the links from where it ends."""
        self._through_s: dict[int, Floats] = {}
        self._cheapest: dict[int, tuple[int, ...]] = {}
        """Of each client, the arcs of the cheapest chain without extras."""
        self._last: dict[int, tuple[int, ...]] = {}

    def arc_costs(self, client: int) -> Floats:
        del client
        return self._compute_s

    def cheapest(self, client: int, extra_s: Floats | None = None) -> tuple[float, Chain]:
        arc_s = self._compute_s if extra_s is None else self._compute_s + extra_s
        found = None
        if extra_s is not None:
            found = self._few.search(lambda: self._among_few(client, extra_s, arc_s))
            if found is None:
                found = self._near.search(lambda: self._among_near(client, arc_s))
        if found is None:
            found = self._among_all(client, arc_s)[:2]
        if found is None or not np.isfinite(found[0]):
            raise no_chain(self.arcs, extra_s)
        cost_s, chosen = found
        if client in self._cheapest:
            self._last[client] = tuple(chosen)
        return cost_s, self.arcs.chain(chosen)

    def _among_all(self, client: int, arc_s: Floats) -> tuple[float, list[int], Floats]:
        """The least cost, infinite if there is no chain; its arcs; (arcs,) the least time to stand before each."""
        best_s = np.full(self._delays.from_client_s.shape[1], np.inf)
        before_s = np.full(len(self.arcs), np.inf)
        for (low, high), servers, ending, links_s in self._blocks:
            if low == high:
                continue
            if ending is None:
                before_s[low:high] = self._delays.from_client_s[client, servers]
            elif ending.size:
                before_s[low:high] = np.minimum.reduce(best_s[ending, None] + links_s, axis=0)
            else:
                continue
            best_s[servers] = np.minimum(best_s[servers], before_s[low:high] + arc_s[low:high])
        last = self._ending[-1]
        if not last.size:
            return float("inf"), [], before_s
        final_s = best_s[last] + self._delays.to_client_s[last, client]
        if not np.isfinite(final_s.min()):
            return float("inf"), [], before_s
        chosen = self._walk_back(int(last[final_s.argmin()]), before_s + arc_s, best_s)
        return float(final_s.min()), chosen, before_s

    def _walk_back(self, server: int, reached_s: Floats, best_s: Floats) -> list[int]:
        """Of equal ones, the arc with the lowest entry, and the lowest server before it."""
        chosen: list[int] = []
        while server >= 0:
            of_server = self.arcs.of_server[server][::-1]
            arc = int(of_server[reached_s[of_server].argmin()])
            chosen.append(arc)
            (low, _), _, ending, links_s = self._blocks[self.arcs.entry.item(arc)]
            server = -1 if ending is None else int(ending[(best_s[ending] + links_s[:, arc - low]).argmin()])
        return chosen[::-1]

    def _among_few(self, client: int, extra_s: Floats, arc_s: Floats) -> Found | None:
        """The least cost and its arcs; None if too many arcs would have to be looked at."""
        if client not in self._through_s:
            self._learn(client)
        if client not in self._cheapest:
            return None
        known = (self._cheapest[client], self._last[client])
        limit_s = min(self._chain_s(client, arc_s, chosen) for chosen in known)
        if limit_s == np.inf:
            return None
        few = (self._through_s[client] + extra_s <= limit_s * (1 + _ROUNDING)).nonzero()[0]
        return self._among(client, few, arc_s) if few.size <= _FEW else None

    def _among_near(self, client: int, arc_s: Floats) -> Found | None:
        """The least cost and its arcs; None if too many servers would have to be looked at."""
        rest_s = self._least_rest_s(client, arc_s)
        best_s, bound_s = np.full((2, rest_s.size), np.inf)
        reached: list[tuple[int, Floats]] = []
        server, limit_s = -1, np.inf
        for _ in range(_NEAR):
            if server < 0 or self._end.item(server) < self.arcs.num_blocks:
                reached.append(self._reach(client, server, arc_s, rest_s, best_s, bound_s))
            else:
                limit_s = min(limit_s, bound_s.item(server) * (1 + _ROUNDING))
            if server >= 0:
                bound_s[server] = np.inf
            server = int(bound_s.argmin())
            least_s = bound_s.item(server)
            if least_s > limit_s:
                near = [low + (through_s <= limit_s).nonzero()[0] for low, through_s in reached]
                return self._among(client, np.unique(np.concatenate(near)), arc_s)
            if least_s == np.inf:
                return None
        return None

    def _least_rest_s(self, client: int, arc_s: Floats) -> Floats:
        """(J,): a lower bound of the time from each server's end to the client."""
        to_client_s = self._delays.to_client_s[:, client]
        relaxed_s = arc_s + self._nearest_s
        relaxed_s[self._final] += to_client_s[self.arcs.server[self._final]]
        rest_s = self._paths.least(relaxed_s, self._tree)[self._end_node]
        last = self._ending[-1]
        rest_s[last] = to_client_s[last]
        return np.asarray(rest_s)

    def _reach(
        self, client: int, server: int, arc_s: Floats, rest_s: Floats, best_s: Floats, bound_s: Floats
    ) -> tuple[int, Floats]:
        """Go on from a server, or -1: the client. Gives the first arc entered there, and each one's bound."""
        if server < 0:
            (low, high), servers, _, _ = self._blocks[0]
            reached_s = self._delays.from_client_s[client, servers]
        else:
            (low, high), servers, _, links_s = self._blocks[self._end.item(server)]
            reached_s = links_s[self._place[server]] + best_s.item(server)
        reached_s += arc_s[low:high]
        through_s = reached_s + rest_s[servers]
        better = (reached_s < best_s[servers]).nonzero()[0]
        if better.size:
            those = servers[better]
            best_s[those], bound_s[those] = reached_s[better], through_s[better]
        return low, through_s

    def _shortest_links(self) -> Floats:
        """(arcs,): from the nearest server before; 0 at the first block, whose links are the client's."""
        nearest_s = np.full(len(self.arcs), np.inf)
        for (low, high), _, ending, links_s in self._blocks:
            if ending is None:
                nearest_s[low:high] = 0.0
            elif ending.size:
                nearest_s[low:high] = links_s.min(axis=0)
        return nearest_s

    def _learn(self, client: int) -> None:
        """The least cost of all chains through each arc, without extras."""
        if len(self._through_s) == _KEPT_CLIENTS:
            oldest = next(iter(self._through_s))
            del self._through_s[oldest]
            self._cheapest.pop(oldest, None)
            self._last.pop(oldest, None)
        cost_s, chosen, before_s = self._among_all(client, self._compute_s)
        after_s = np.full(self._delays.from_client_s.shape[1], np.inf)
        last = self._ending[-1]
        after_s[last] = self._delays.to_client_s[last, client]
        for (low, high), servers, ending, links_s in self._blocks[:0:-1]:
            if ending is not None and ending.size and low < high:
                after_s[ending] = (links_s + (self._compute_s[low:high] + after_s[servers])).min(axis=1)
        self._through_s[client] = before_s + self._compute_s + after_s[self.arcs.server]
        if cost_s < np.inf:
            self._cheapest[client] = self._last[client] = tuple(chosen)

    def _chain_s(self, client: int, arc_s: Floats, chosen: tuple[int, ...]) -> float:
        servers = [self.arcs.server.item(arc) for arc in chosen]
        cost_s = self._delays.from_client_s.item(client, servers[0]) + sum([arc_s.item(arc) for arc in chosen])
        for here, there in pairwise(servers):
            cost_s += self._delays.between_s.item(here, there)
        return float(cost_s + self._delays.to_client_s.item(servers[-1], client))

    def _among(self, client: int, few: Ints, arc_s: Floats) -> Found:
        """As _among_all, where only these arcs may be used; they are sorted by entry."""
        arcs, delays, best = self.arcs, self._delays, dict[int, tuple[float, int, int]]()
        ending: dict[int, list[int]] = {}
        columns = (few, arcs.server[few], arcs.entry[few], arcs.end[few], arc_s[few])
        for arc, server, entry, end, cost_s in zip(*(column.tolist() for column in columns), strict=True):
            before, reached_s = -1, float("inf")
            if entry == 0:
                reached_s = delays.from_client_s.item(client, server)
            for other in sorted(ending.get(entry, ())):
                through_s = best[other][0] + delays.between_s.item(other, server)
                if through_s < reached_s:
                    before, reached_s = other, through_s
            if reached_s + cost_s < (best[server][0] if server in best else float("inf")):
                if server not in best:
                    ending.setdefault(end, []).append(server)
                best[server] = (reached_s + cost_s, arc, before)
        lowest_s, server = float("inf"), -1
        for last in sorted(ending.get(arcs.num_blocks, ())):
            final_s = best[last][0] + delays.to_client_s.item(last, client)
            if final_s < lowest_s:
                lowest_s, server = final_s, last
        chosen = []
        while server >= 0:
            chosen.append(best[server][1])
            server = best[server][2]
        return lowest_s, chosen[::-1]
