"""Prices with which the bound of the relaxation is tight."""

import numpy as np

from geopetals.problem import Floats
from geopetals.push_bound.graph import Graph
from geopetals.push_bound.relaxation import Relaxation

_MOMENTUM = 0.4
_PATIENCE = 3


def first_prices(graph: Graph) -> Floats:
    """What a use of each server saves if all blocks cost what they do on the last one needed, delays spread on them."""
    into_s = np.minimum(graph.from_client_s, graph.between_s.min(axis=0))
    each_s = graph.block_s + np.where(np.isfinite(into_s), into_s, 0) / graph.most
    order = np.argsort(each_s, kind="stable")
    needed = int(np.searchsorted(np.cumsum(graph.most[order]), graph.num_blocks))
    return np.asarray(np.maximum(each_s[order[needed]] - each_s, 0) * graph.most)


def tighten(relaxation: Relaxation, reached_s: float, *, steps: int) -> None:
    """Better prices, by subgradient steps of Polyak's length. A path is known that takes reached_s."""
    price_s = best_price_s = relaxation.price_s
    best_s, scale, stalled, direction = -np.inf, 1.0, 0, np.zeros_like(price_s)
    for _ in range(steps):
        bound_s = relaxation.least_s()
        stalled = 0 if bound_s > best_s * (1 + 1e-4) else stalled + 1
        if bound_s > best_s:
            best_s, best_price_s = bound_s, price_s
        uses = np.bincount(relaxation.path(), minlength=price_s.size) - 1
        direction = (1 - _MOMENTUM) * uses + _MOMENTUM * direction
        ascent = np.where((price_s <= 0) & (direction < 0), 0, direction)
        if bound_s >= reached_s or not ascent.any():
            break
        if stalled > _PATIENCE:
            price_s, scale, stalled = best_price_s, 0.7 * scale, 0
        step_s = scale * (min(reached_s, 1.3 * best_s) - bound_s) / (ascent**2).sum()
        price_s = np.maximum(price_s + step_s * ascent, 0)
        relaxation.set_prices(price_s)
    if relaxation.price_s is not best_price_s:
        relaxation.set_prices(best_price_s)
