"""The cheapest chain of one session on a swarm without others, and chains to fall back upon."""

from collections.abc import Collection

import numpy as np

from geopetals.errors import BlocksError, NoChain
from geopetals.plan import Chain, Hop, Placement, Span
from geopetals.routing.graph import Arcs, build_graph
from geopetals.timing import HopCosts


def shortest_chain(
    placement: Placement, costs: HopCosts, client: int, *, avoid: Collection[int] = (), span: Span | None = None
) -> tuple[float, Chain]:
    """The least cost in seconds, and the chain, over all blocks or only those of `span`. Raises NoChain.

    avoid: servers that the chain must not use. span: what a session still lacks when a server in its midst is gone; its
    last server may hold more blocks than are asked for.
    """
    if span is not None and not span.end <= placement.num_blocks:
        raise BlocksError(f"{span} is outside the model's {placement.num_blocks} blocks: choose a span inside.")
    part = placement if span is None else _clipped(placement, span)
    graph = build_graph(part, costs)
    cost_s, chain = graph.cheapest(client, forbidden(graph.arcs, avoid))
    return cost_s, chain if span is None else _shifted(chain, span.start)


def backup_chain(placement: Placement, costs: HopCosts, client: int, primary: Chain) -> Chain | None:
    """The chain to take when a server of `primary` fails: none of its servers, or as few as can be; the cheapest then.

    None if there is no other chain than the primary.
    """
    graph = build_graph(placement, costs)
    shared = np.isin(graph.arcs.server, primary.servers)
    # More than any chain can differ by, so that one shared server less always counts for more than a shorter chain.
    arc_s = graph.arc_costs(client)
    dearest_s = float(arc_s[np.isfinite(arc_s)].sum()) + _largest_delay_s(costs) * (len(placement) + 1)
    try:
        chain = graph.cheapest(client, np.where(shared, dearest_s, 0.0))[1]
    except NoChain:
        return None
    return None if set(chain.servers) >= set(primary.servers) else chain


def forbidden(arcs: Arcs, avoid: Collection[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
    """Infinite for the arcs of servers to avoid, 0 for the others; None if there are none to avoid."""
    return np.where(np.isin(arcs.server, list(avoid)), np.inf, 0.0) if avoid else None


def _largest_delay_s(costs: HopCosts) -> float:
    delays = [costs.relay_s] if costs.push is None else [costs.push.from_client_s, costs.push.between_s]
    return max(float(d[np.isfinite(d)].max(initial=0.0)) for d in delays if d is not None)


def _clipped(placement: Placement, span: Span) -> Placement:
    starts = np.clip(placement.starts, span.start, span.end) - span.start
    ends = np.clip(placement.ends, span.start, span.end) - span.start
    empty = starts >= ends
    return Placement(num_blocks=span.blocks, starts=np.where(empty, 0, starts), ends=np.where(empty, 0, ends))


def _shifted(chain: Chain, blocks: int) -> Chain:
    return Chain(tuple(Hop(hop.server, hop.start + blocks, hop.end + blocks) for hop in chain))
