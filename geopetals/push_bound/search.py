"""The cheapest path that uses each server at most once, by layers of paths with the same number of servers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geopetals.problem import Floats, Ints
from geopetals.push_bound.filling import filled_s
from geopetals.push_bound.relaxation import Relaxation

TOLERANCE = 1e-10
"""Relative: paths that would be better by less are not looked for."""
_CUTS = 7
"""Slopes are taken between as many numbers of blocks."""
_ROWS = 2048
"""Paths at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """Paths over as many servers each, none dominated: of those over the same set, with the same end, the shortest."""

    visited: Ints
    server: Ints
    delay_s: Floats
    parent: Ints
    """The index of the path without its last server, in the layer before."""

    def take(self, kept: NDArray[np.intp] | slice) -> "_Layer":
        return _Layer(self.visited[kept], self.server[kept], self.delay_s[kept], self.parent[kept])


class Search:
    """Extends paths that the bounds of a relaxation do not rule out."""

    def __init__(self, relaxation: Relaxation) -> None:
        self.graph, self.relaxation = relaxation.graph, relaxation
        graph = self.graph
        self.servers = np.arange(graph.block_s.size)
        self.bits = 1 << self.servers
        rates_s = _rates_s(relaxation)
        dearer_s = graph.block_s[:, None] - rates_s
        self.use_s = np.where(dearer_s > 0, dearer_s, dearer_s * graph.most[:, None]) + relaxation.price_s[:, None]
        """(J, rates): what a use of a server costs, price included, beyond its blocks at that rate."""
        done = np.arange(graph.num_blocks, 0, -1)[:, None]
        self.rest_s = [(rate_s * done + relaxation.after_s[:-1]).min(axis=0) for rate_s in rates_s]
        """(J,) for each rate: blocks before at that rate, and what comes after the server."""

    def run(self, reached_s: float, width: int) -> tuple[float, list[int], float]:
        """Look for paths that take less than reached_s; of those with as many servers, extend the `width` most likely.

        Returns the least time reached, the servers of that path (none if it is reached_s), and a lower bound of the
        paths that were not looked at.
        """
        layers: list[_Layer] = []
        best: list[int] = []
        open_s = np.inf
        layer = _Layer(*np.zeros((4, 1), dtype=np.int64))
        for count in range(1, min(self.servers.size, self.graph.num_blocks) + 1):
            layer, bound_s = self._extended(layer, count, reached_s * (1 - TOLERANCE))
            layer, _, open_s = _likeliest(layer, bound_s, 3 * width, open_s)
            if not layer.server.size:
                break
            total_s, bound_s = self._bounds(layer, count)
            least = int(total_s.argmin())
            if total_s[least] < reached_s:
                reached_s, best = float(total_s[least]), _servers([*layers, layer], least)
            kept = np.flatnonzero(bound_s < reached_s * (1 - TOLERANCE))
            layer, _, open_s = _likeliest(layer.take(kept), bound_s[kept], width, open_s)
            layers.append(layer)
        return reached_s, best, open_s

    def _extended(self, layer: _Layer, count: int, limit_s: float) -> tuple[_Layer, Floats]:
        """Paths of `count` servers that may take less than limit_s, with quick lower bounds."""
        graph, visited = self.graph, layer.visited[:, None]
        delay_s = layer.delay_s[:, None] + (graph.between_s[layer.server] if count > 1 else graph.from_client_s)
        delay_s[(visited & (self.bits | graph.bars) != 0) | (graph.needs & ~visited != 0)] = np.inf
        used_s = (visited & self.bits != 0) @ self.use_s
        bound_s = np.full(delay_s.shape, -np.inf)
        for rate, rest_s in enumerate(self.rest_s):
            np.maximum(bound_s, used_s[:, [rate]] + self.use_s[:, rate] + rest_s, out=bound_s)
        bound_s += delay_s - self.relaxation.price_s.sum()
        parent, server = np.nonzero(bound_s < limit_s)
        longer = _Layer(layer.visited[parent] | self.bits[server], server, delay_s[parent, server], parent)
        kept = _undominated(longer)
        return longer.take(kept), bound_s[parent, server][kept]

    def _bounds(self, layer: _Layer, count: int) -> tuple[Floats, Floats]:
        """The time if the path ends here, and a lower bound if it goes on."""
        chunks = [slice(start, start + _ROWS) for start in range(0, layer.server.size, _ROWS)]
        ends_s, goes_on_s = zip(*(self._bounds_of(layer.take(chunk), count) for chunk in chunks), strict=True)
        return np.concatenate(ends_s), np.concatenate(goes_on_s)

    def _bounds_of(self, layer: _Layer, count: int) -> tuple[Floats, Floats]:
        price_s, server = self.relaxation.price_s, layer.server
        sets, rows = np.unique(layer.visited, return_inverse=True)
        compute_s = filled_s(self.graph, sets, count)[rows]
        left = np.arange(self.graph.num_blocks - count, 0, -1)
        after_s = self.relaxation.after_s[left[:, None], server].T
        returned_s = (layer.visited[:, None] & self.bits == 0) @ price_s
        goes_on_s = (compute_s[:, :-1] + after_s).min(axis=1, initial=np.inf) - returned_s
        return layer.delay_s + compute_s[:, -1] + self.graph.to_client_s[server], layer.delay_s + goes_on_s


def _rates_s(relaxation: Relaxation) -> Floats:
    """Times per block to weigh blocks done against blocks left: slopes of the least to come, and those of servers."""
    least_s, block_s = relaxation.after_s.min(axis=1), relaxation.graph.block_s
    blocks = np.flatnonzero(np.isfinite(least_s))
    cuts = blocks[np.linspace(0, blocks.size - 1, min(_CUTS, blocks.size)).astype(np.int64)]
    slopes_s = np.diff(least_s[cuts]) / np.diff(cuts)
    # Where memory is short, another block costs more than on any server.
    own_s = [block_s.min(), np.median(block_s), block_s.max(), 2 * block_s.max(), 4 * block_s.max()]
    return np.unique(np.concatenate([np.maximum(slopes_s, 0), own_s]))


def _undominated(layer: _Layer) -> NDArray[np.intp]:
    """Of the paths over the same servers with the same last one, the shortest."""
    key = layer.visited << 5 | layer.server
    order = np.lexsort((layer.delay_s, key))
    first = np.diff(key[order], prepend=-1) != 0
    return np.asarray(order[first])


def _likeliest(layer: _Layer, bound_s: Floats, width: int, open_s: float) -> tuple[_Layer, Floats, float]:
    """The paths with the least bounds, and the least bound of the others or open_s."""
    if bound_s.size <= width:
        return layer, bound_s, open_s
    order = np.argsort(bound_s, kind="stable")
    return layer.take(order[:width]), bound_s[order[:width]], min(open_s, float(bound_s[order[width]]))


def _servers(layers: list[_Layer], index: int) -> list[int]:
    servers = []
    for layer in reversed(layers):
        servers.append(int(layer.server[index]))
        index = int(layer.parent[index])
    return servers[::-1]
