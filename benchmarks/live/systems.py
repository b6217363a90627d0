"""From a system's name to its swarm."""

from collections.abc import Iterator
from contextlib import contextmanager

from live import placements
from live.coordinated import CoordinatedSwarm
from live.fixed import FixedSwarm
from live.placements import OURS_ON_STOCK, PAPER, STOCK, STOCK_PLACED, Spans
from live.stage import Stage, Swarm
from live.stock import StockSwarm


@contextmanager
def swarm(
    system: str, stage: Stage, order: list[str], *, rate_per_s: float, stock_spans: Spans | None
) -> Iterator[Swarm]:
    """Started by servers that join in this order; every process is gone when the block is left.

    `stock_spans`: what stock servers really took that joined in this order; None: PETALS' rule says it.
    """
    started = _made(system, stage, order, rate_per_s, stock_spans)
    try:
        started.start(order)
        yield started
    finally:
        started.stop()


def _made(
    system: str, stage: Stage, order: list[str], rate_per_s: float, stock_spans: Spans | None
) -> StockSwarm | FixedSwarm | CoordinatedSwarm:
    live = stage.live
    cluster = live.with_demand(rate_per_s)
    if system == STOCK:
        return StockSwarm(stage, None)
    if system == OURS_ON_STOCK:
        return StockSwarm(stage, placements.searched_spans(live, cluster))
    if system == STOCK_PLACED:
        spans = stock_spans or placements.stock_spans(live, order)
        return FixedSwarm(stage, spans, lambda _: live.stock_cache_tokens)
    pins = placements.paper_spans(live, cluster) if system == PAPER else None
    return CoordinatedSwarm(stage, pins, rate_per_s=rate_per_s)
