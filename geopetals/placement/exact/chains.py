"""The chains that a flow of sessions consists of."""

from geopetals.plan import Chain, Hop


def chains_of(
    sessions: int, hops: dict[Hop, int], links: dict[tuple[int, int], int] | None, num_blocks: int
) -> tuple[Chain, ...]:
    """A chain for each session. links, for push: how many sessions go from one server to another; None for relay.

    A server is left at one block only, so a link between two servers says at which block they meet.
    """
    hops, links = dict(hops), None if links is None else dict(links)
    return tuple(_take(hops, links, num_blocks) for _ in range(sessions))


def _take(hops: dict[Hop, int], links: dict[tuple[int, int], int] | None, num_blocks: int) -> Chain:
    path: list[Hop] = []
    block = 0
    while block < num_blocks:
        last = path[-1].server if path else None
        hop = next(
            hop
            for hop, count in hops.items()
            if count and hop.start == block and (links is None or last is None or links.get((last, hop.server), 0))
        )
        hops[hop] -= 1
        if links is not None and last is not None:
            links[last, hop.server] -= 1
        path.append(hop)
        block = hop.end
    return Chain(tuple(path))
