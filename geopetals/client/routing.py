"""Which servers a session goes through: the chain with the least time per token, as the client sees the swarm.

The planning core decides, for one session alone, on what servers say of themselves in the DHT and on the round trips
that this client measured. Where two neighbours push, the way from one to the other is half of the round trip between
them; where they do not, it leads through the client: half of each one's round trip to it. So that a chain without
pushes costs the sum of its round trips, PETALS' relay model, and one that pushes everywhere the way round the ring.
A server may be entered at any of its blocks and is left at its end.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from geopetals.errors import NoChain
from geopetals.plan import Chain, Placement, Span, spans_of
from geopetals.problem import Floats, OneWayDelays
from geopetals.routing.graph import build_graph
from geopetals.timing import HopCosts

_CLIENT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A server that answers: its blocks [start, end), round trip, time per block and token, price for avoiding it.

    `protocol` as in its record. `links`: round trips in seconds that it measured to other servers, by peer id.
    """

    peer_id: str
    start: int
    end: int
    rtt_s: float
    block_s: float
    penalty_s: float = 0.0
    protocol: int = 0
    links: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One server of a chain and the blocks [start, end) it computes for the session.

    `protocol` as in its record. In the route of a session `mode` is how the hop's output leaves it: "push" to the next
    server, "relay" to the client who sends it on, or "answer" where it is what the client waits for. `why` says why it
    is relayed.
    """

    peer_id: str
    start: int
    end: int
    protocol: int = 0
    mode: Literal["push", "relay", "answer"] | None = None
    why: str = ""


def shortest_chain(
    candidates: Sequence[Candidate],
    num_blocks: int,
    *,
    span: Span | None = None,
    push: bool = True,
    bad_links: Collection[tuple[str, str]] = (),
) -> tuple[Hop, ...]:
    """The cheapest chain over all blocks, or those of `span`. Raises NoChain that names the missing blocks.

    `push`: whether servers that can, push. `bad_links`: pairs of peer ids that do not, for the time being.
    """
    span = span or Span(0, num_blocks)
    inside = sorted((c for c in candidates if c.start < span.end and span.start < c.end), key=lambda c: c.peer_id)
    starts = np.array([max(c.start, span.start) - span.start for c in inside], dtype=np.int64)
    ends = np.array([min(c.end, span.end) - span.start for c in inside], dtype=np.int64)
    placement = Placement(num_blocks=span.blocks, starts=starts, ends=ends)
    _check_coverage(placement, span, num_blocks)
    costs = HopCosts(block_s=np.array([c.block_s for c in inside]), push=_delays(inside, push, bad_links))
    graph = build_graph(placement, costs)
    penalty_s = np.array([c.penalty_s for c in inside])
    extra_s = penalty_s[graph.arcs.server] if penalty_s.any() else None
    _, chain = graph.cheapest(_CLIENT, extra_s)
    return _named(chain, inside, span.start)


def _check_coverage(placement: Placement, span: Span, num_blocks: int) -> None:
    missing = [span.start + block for block in np.flatnonzero(placement.replicas() == 0).tolist()]
    if missing:
        raise NoChain(f"{name_blocks(missing)} of {num_blocks} have no server: start one with `geopetals serve`.")


def _delays(servers: Sequence[Candidate], push: bool, bad_links: Collection[tuple[str, str]]) -> OneWayDelays:
    rtt_s = np.array([server.rtt_s for server in servers])
    relayed_s = rtt_s[:, None] + rtt_s
    pushes = np.array([push and server.protocol > 0 for server in servers])
    can_push = pushes[:, None] & pushes
    place = {server.peer_id: number for number, server in enumerate(servers)}
    for here, there in bad_links:
        if here in place and there in place:
            can_push[place[here], place[there]] = False
    between_s = np.where(can_push, _round_trips_s(servers, rtt_s, place), relayed_s) / 2
    return OneWayDelays(from_client_s=rtt_s[None, :] / 2, between_s=between_s, to_client_s=rtt_s[:, None] / 2)


def _round_trips_s(servers: Sequence[Candidate], rtt_s: Floats, place: Mapping[str, int]) -> Floats:
    """(J, J): between servers. What none of the two has measured is estimated: two points at known distances from a
    third, in directions that nothing is known of, are the root of the sum of squares apart, in the quadratic mean.
    """
    between_s = np.hypot(rtt_s[:, None], rtt_s)
    measured_s = np.full_like(between_s, np.inf)
    for number, server in enumerate(servers):
        for peer_id, seconds in server.links.items():
            other = place.get(peer_id)
            if other is not None:
                measured_s[number, other] = seconds
    measured_s = np.minimum(measured_s, measured_s.T)
    return np.where(np.isfinite(measured_s), measured_s, between_s)


def _named(chain: Chain, servers: Sequence[Candidate], first_block: int) -> tuple[Hop, ...]:
    return tuple(
        Hop(
            peer_id=servers[hop.server].peer_id,
            start=hop.start + first_block,
            end=hop.end + first_block,
            protocol=servers[hop.server].protocol,
        )
        for hop in chain
    )


def name_blocks(blocks: Sequence[int]) -> str:
    """`blocks 3:5, 9:12` for a sorted list."""
    return "blocks " + ", ".join(str(span) for span in spans_of(blocks))
