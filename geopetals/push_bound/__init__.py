"""The cheapest path of one client through servers that push, each used at most once: exact for few servers.

Which blocks a server of the path computes does not matter, only how many: given the set of servers, the fastest are
filled first (filling.py). So the shortest path over each set to each last server is all that has to be kept. Sets are
extended layer by layer (search.py), but for those that a lower bound rules out (relaxation.py, prices.py). Where more
paths are left than a stage may extend, the next stage has better bounds and extends more; after the last, the least
bound of what was not extended is a lower bound of all paths. Up to 16 servers the
result is always exact. Work is limited in steps, so that results repeat.
"""

from dataclasses import dataclass

from geopetals.problem import Floats, Ints, OneWayDelays
from geopetals.push_bound.filling import filling
from geopetals.push_bound.graph import Graph
from geopetals.push_bound.prices import first_prices, tighten
from geopetals.push_bound.relaxation import Relaxation, reusing_s
from geopetals.push_bound.search import TOLERANCE, Search

_SEARCHED_SERVERS = 25
_FEW_SERVERS = 16
_FIRST_WIDTH = 30
_STAGES = ((0, 40, 100), (400, 40, 1_000), (1_600, 20, 5_000), (6_400, 20, 10_000))
"""(states of the relaxation, steps of its prices, paths extended of each layer)"""
_ALL_OF_FEW = (6_400, 1, 102_960)
"""The last stage for up to 16 servers: there are at most 9 * binomial(16, 9) paths in a layer, so none is left out."""

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
    relaxation = Relaxation(graph, [[]] * block_s.size)
    if relaxation.least_s() == float("inf"):
        return PathBound(least_s=float("inf"), reached_s=float("inf"), path=(), searched=True)
    relaxation.set_prices(first_prices(graph))
    reached_s, servers, open_s = Search(relaxation).run(float("inf"), _FIRST_WIDTH)
    least_s = min(open_s, reached_s)
    for states, steps, width in (*_STAGES, _ALL_OF_FEW) if block_s.size <= _FEW_SERVERS else _STAGES:
        if least_s >= reached_s * (1 - TOLERANCE):
            break
        relaxation = tighten(relaxation, reached_s, steps=steps, states=states)
        reached_s, better, open_s = Search(relaxation).run(reached_s, width)
        servers = better or servers
        least_s = min(max(least_s, relaxation.least_s(), open_s), reached_s)
    if least_s >= reached_s * (1 - TOLERANCE):
        least_s = reached_s
    return PathBound(least_s=least_s, reached_s=reached_s, path=filling(graph, servers), searched=True)
