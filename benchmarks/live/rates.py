"""The rate at which stock PETALS' wait grows without end, by the simulator: loads are shares of it, for all systems."""

import math
import statistics
from dataclasses import dataclass

import numpy as np

from geopetals.errors import GeoPetalsError
from geopetals.plan import Placement, Span
from geopetals.problem import Ints, Problem
from geopetals.simulation import Arrivals, Load, Rules, Scenario, World, simulate
from geopetals.simulation.policies import Desk, Stock
from live.placements import Spans, placement_of, stock_spans
from live.translation import Live, with_software

HOP_S = 0.0115
"""Software of stock PETALS per hop, as measured on loopback."""
SHARES = {"half": 0.5, "over": 1.5}
_SESSIONS, _MOST = 600, 1e4
_GROWTH = 0.25
"""The mean wait of the last third, in sessions alone, from which it counts as growing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Placed:
    """Stock PETALS with given blocks, and the cache that its servers have."""

    live: Live
    spans: Spans

    @property
    def name(self) -> str:
        return "stock"

    def place(self, world: World, seed: int) -> Placement:
        return placement_of(self.live, self.spans)

    def slots(self, world: World, problem: Problem, held: Ints) -> Ints:
        return np.minimum(self.live.stock_slots(held), problem.slots(held))

    def desk(self, world: World, problem: Problem, placement: Placement, rules: Rules) -> Desk:
        return Stock().desk_with(world, problem, placement, rules, self.slots(world, problem, placement.held))

    def join(self, world: World, placement: Placement, server: int) -> Span | None:
        return Stock().join(world, placement, server)


def diverging_rate(live: Live, orders: list[list[str]]) -> float:
    """Sessions per second, the median over the orders of joining that leave no block without a server."""
    found = []
    for order in orders:
        spans = stock_spans(live, order)
        if placement_of(live, spans).covers():
            found.append(_rate(live, spans))
    return statistics.median(found)


def _rate(live: Live, spans: Spans) -> float:
    """To 3 %: by doubling, then by halving the ratio between a rate that can be served and one that cannot."""
    lone_s = _figures(live, spans, 1e-6, sessions=8)[1]
    low, high = 0.1 / lone_s, 0.2 / lone_s
    while not _grows(live, spans, high, lone_s) and high < _MOST / lone_s:
        low, high = high, 2 * high
    while high / low > 1.03:
        middle = math.sqrt(low * high)
        if _grows(live, spans, middle, lone_s):
            high = middle
        else:
            low = middle
    return low


def _grows(live: Live, spans: Spans, rate_per_s: float, lone_s: float) -> bool:
    return _figures(live, spans, rate_per_s, sessions=_SESSIONS)[0] > _GROWTH * lone_s


def _figures(live: Live, spans: Spans, rate_per_s: float, *, sessions: int) -> tuple[float, float]:
    """The mean wait of the last third, and the mean time of sessions."""
    scenario = Scenario(load=Load(arrivals=Arrivals(rate_per_s=rate_per_s), sessions=sessions, warm_up=0))
    world = World.of(with_software(live.cluster, HOP_S))
    try:
        result = simulate(world, scenario, _Placed(live=live, spans=spans), seed=0)
    except GeoPetalsError:
        return float("inf"), float("inf")
    waits = result.log.wait_s
    waits = np.where(np.isnan(waits), np.inf, waits)
    return float(waits[-len(waits) // 3 :].mean()), float(np.nanmean(result.end_to_end_s()))
