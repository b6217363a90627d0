"""Which server holds which blocks under each system, where that is decided beforehand. Pure."""

from collections.abc import Mapping

from geopetals.cluster import Cluster
from geopetals.placement.demand import search_for_demand
from geopetals.placement.load import cg_bp_for_demand
from geopetals.placement.petals import petals_placement
from geopetals.plan import Placement
from geopetals.planning.stock import StockSwarm
from live.translation import Live

STOCK, STOCK_PLACED, OURS_ON_STOCK, OURS, PAPER = (
    "stock",
    "stock+our-data-plane",
    "our-placement+stock-data-plane",
    "geopetals",
    "paper",
)
SYSTEMS = (STOCK, STOCK_PLACED, OURS_ON_STOCK, OURS, PAPER)
NEEDS_STOCK = RELAYS = (STOCK, OURS_ON_STOCK)
NEEDS_COORDINATOR = (OURS, PAPER)
DEMAND_MATTERS = (OURS, PAPER, OURS_ON_STOCK)
"""Placed for the load: these are started anew for each."""
Spans = Mapping[str, tuple[int, int]]


def stock_spans(live: Live, order: list[str]) -> Spans:
    """PETALS' rule, for servers that join in this order."""
    swarm = StockSwarm(live.merged, live.large)
    rps = swarm.announced.announced_rps(live.stock_blocks)
    numbers = [live.scenario.server_names.index(name) for name in order]
    return spans_of(live, petals_placement(live.large, live.stock_blocks, rps, numbers))


def searched_spans(live: Live, cluster: Cluster) -> Spans:
    """The search, for relay, as stock's data plane is."""
    return spans_of(live, search_for_demand(live.problem(cluster)).placement)


def paper_spans(live: Live, cluster: Cluster) -> Spans:
    """CG-BP for the demand."""
    return spans_of(live, cg_bp_for_demand(live.problem(cluster)).placement)


def spans_of(live: Live, placement: Placement) -> Spans:
    """By the servers' names; those that hold nothing are left out."""
    found = {}
    for index, name in enumerate(live.scenario.server_names):
        if (span := placement.span(index)) is not None:
            found[name] = (span.start, span.end)
    return found


def placement_of(live: Live, spans: Spans) -> Placement:
    return Placement.of([spans.get(name) for name in live.scenario.server_names], live.model.num_blocks)
