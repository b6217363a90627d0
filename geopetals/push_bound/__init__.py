"""The cheapest path of one client through servers that push, each used at most once: exact for up to 25 servers.

Which blocks a server of the path computes does not matter, only how many: given the set of servers, the fastest are
filled first (filling.py). So the shortest path over each set to each last server is all that has to be kept. Sets are
extended layer by layer (search.py), but for those that a lower bound rules out (relaxation.py, prices.py), and as long
as they are few: most swarms are done in milliseconds. What is left open is for a solver (circuit.py), which starts from
the best path found. Work is limited in steps, so that results repeat; if the solver is stopped, its bound holds.
"""

from dataclasses import dataclass

from geopetals.problem import Floats, Ints, OneWayDelays
from geopetals.push_bound.filling import filling, path_s
from geopetals.push_bound.graph import Graph
from geopetals.push_bound.prices import first_prices, tighten
from geopetals.push_bound.relaxation import Relaxation, reusing_s
from geopetals.push_bound.search import TOLERANCE, Search

_SEARCHED_SERVERS = 25
_FIRST_WIDTH, _WIDTH = 30, 100
"""Paths extended of each layer, with the first prices and with better ones."""
_PRICE_STEPS = 40

Path = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PathBound:
    """No path takes less than least_s, to 1e-9 relative."""

    least_s: float
    reached_s: float
    """The time of the best path found: least_s where that is exact; infinite if there is none."""
    path: Path
    """(server, blocks) of that path, in order."""
    searched: bool
    """Whether paths were looked for at all: they are for up to 25 servers."""


def cheapest_path(delays: OneWayDelays, block_s: Floats, most: Ints, num_blocks: int) -> PathBound:
    """For the one client of `delays`; server j takes 1 to most[j] blocks, and together they can take num_blocks.

    The diagonal of between_s must be infinite.
    """
    if block_s.size > _SEARCHED_SERVERS:
        least_s = reusing_s(delays, block_s, most, num_blocks)
        return PathBound(least_s=least_s, reached_s=float("inf"), path=(), searched=False)
    graph = Graph.from_delays(delays, block_s, most, num_blocks)
    least_s, reached_s, servers = _searched(graph)
    if not _closed(least_s, reached_s) and least_s > 0:
        least_s, reached_s, servers = _solved(graph, least_s, reached_s, servers)
    if _closed(least_s, reached_s):
        least_s = reached_s
    return PathBound(least_s=least_s, reached_s=reached_s, path=filling(graph, servers), searched=True)


def _closed(least_s: float, reached_s: float) -> bool:
    return least_s >= reached_s * (1 - TOLERANCE)


def _searched(graph: Graph) -> tuple[float, float, list[int]]:
    """A lower bound of all paths, the time of the best found, and its servers."""
    relaxation = Relaxation(graph)
    least_s = relaxation.least_s()
    if least_s == float("inf"):
        return least_s, least_s, []
    relaxation.set_prices(first_prices(graph))
    reached_s, servers, open_s = Search(relaxation).run(float("inf"), _FIRST_WIDTH)
    least_s = min(max(least_s, open_s), reached_s)
    if not _closed(least_s, reached_s):
        tighten(relaxation, reached_s, steps=_PRICE_STEPS)
        reached_s, better, open_s = Search(relaxation).run(reached_s, _WIDTH)
        servers = better or servers
        least_s = min(max(least_s, relaxation.least_s(), open_s), reached_s)
    return least_s, reached_s, servers


def _solved(graph: Graph, least_s: float, reached_s: float, servers: list[int]) -> tuple[float, float, list[int]]:
    from geopetals.push_bound.circuit import cheapest_circuit  # The solver is slow to import, and seldom needed.

    unit_s = TOLERANCE / 2 * least_s / (graph.num_blocks + graph.block_s.size + 1)
    bound_s, found = cheapest_circuit(graph, unit_s, reached_s, servers)
    found_s = path_s(graph, found)
    if found_s < reached_s:
        reached_s, servers = found_s, found
    return min(max(least_s, bound_s), reached_s), reached_s, servers
