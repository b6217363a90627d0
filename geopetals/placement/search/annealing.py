"""Simulated annealing from a placement: small changes of one server or one cut, kept by their cost and by chance."""

import math
import random
from dataclasses import dataclass

from geopetals.placement.search.carrying import Carrier
from geopetals.placement.search.effort import Effort
from geopetals.placement.search.moves import Moves
from geopetals.placement.search.spans import Change, Moving, Spans

STRIDE = 16
"""Steps between two looks at the clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Temperatures as shares of the cost, falling geometrically while the effort spent rises from `begin` to `end`."""

    first: float = 0.015
    last: float = 5e-5
    begin: float = 0.0
    end: float = 1.0

    def temperature(self, spent: float) -> float:
        done = (spent - self.begin) / max(self.end - self.begin, 1e-12)
        return float(self.first * (self.last / self.first) ** min(max(done, 0.0), 1.0))


def anneal(
    carrier: Carrier, origin: Spans, *, rng: random.Random, effort: Effort, schedule: Schedule, moving: Moving
) -> Spans:
    """The cheapest placement met, origin included."""
    moves = Moves(carrier.instance, rng)
    if not moves.servers:
        return origin
    # Of what a placement without penalties may cost, or else the walk from one with them would be blind.
    scale_s = max(min(origin.cost_s, 3 * carrier.instance.floor_s), 1e-12)
    now, best = origin.copy(), origin.copy()
    while (spent := effort.spent()) < schedule.end:
        temperature_s = schedule.temperature(spent) * scale_s
        for _ in range(STRIDE):
            change = moves.propose(now.starts, now.ends)
            limit_s = now.cost_s - temperature_s * math.log(1.0 - rng.random())
            if change and _changed(carrier, now, change, limit_s, moving) and now.cost_s < best.cost_s:
                best = now.copy()
        effort.count(STRIDE)
    return best


def _changed(carrier: Carrier, now: Spans, change: Change, limit_s: float, moving: Moving) -> bool:
    """Whether the change costs less than the limit; it is made then."""
    starts, ends = now.starts, now.ends
    before = [(j, starts[j], ends[j]) for j, _, _ in change]
    for j, start, end in change:
        starts[j], ends[j] = start, end
    moving_s = moving.total_s(starts, ends) if moving.block_s else 0.0
    cost_s = moving_s + carrier.cost_s(starts, ends, limit_s - moving_s)
    if cost_s < limit_s:
        now.cost_s = cost_s
        return True
    for j, start, end in before:
        starts[j], ends[j] = start, end
    return False
