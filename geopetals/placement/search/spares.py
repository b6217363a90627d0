"""Servers that no session planned for needs: they get blocks too, for the sessions that nobody planned for."""

import numpy as np

from geopetals.placement.cg_bp import blocks_to_hold
from geopetals.placement.search.carrying import Carrier
from geopetals.placement.search.instance import Instance
from geopetals.placement.search.spans import Spans
from geopetals.placement.windows import weakest
from geopetals.problem import Ints


def fill_spares(carrier: Carrier, spans: Spans) -> Spans:
    """Servers without blocks take, as in CG-BP once all is served, the window that carries the fewest sessions.

    The placement stays as it is if the sessions would be routed worse with them, which greedy routing may do.
    """
    instance = carrier.instance
    total = int(instance.sessions.sum())
    wanted = np.minimum(_sizes(instance, total), instance.most)
    spare = [j for j in instance.movable if not spans.ends[j] and wanted[j]]
    if not spare:
        return spans
    filled = spans.copy()
    served = np.zeros(instance.num_blocks, dtype=np.int64)
    for j, (start, end) in enumerate(zip(spans.starts, spans.ends, strict=True)):
        if end > start:
            served[start:end] += instance.slots[j][end - start] // (end - start)
    for j in spare:
        blocks = int(wanted[j])
        start = weakest(served, blocks)
        filled.starts[j], filled.ends[j] = start, start + blocks
        served[start : start + blocks] += instance.slots[j][blocks] // blocks
    # Sums of the same costs in another order differ in their last bits.
    cost_s = carrier.cost_s(filled.starts, filled.ends)
    if cost_s > carrier.cost_s(spans.starts, spans.ends) * (1 + 1e-12):
        return spans
    filled.cost_s = min(cost_s, spans.cost_s)
    return filled


def _sizes(instance: Instance, sessions: int) -> Ints:
    """With room for all sessions, where that is not too much to ask."""
    for load in (sessions, max(sessions // 4, 1), 1):
        sizes = blocks_to_hold(instance.problem, load)
        if sizes.any():
            return sizes
    return np.zeros(instance.num_servers, dtype=np.int64)
