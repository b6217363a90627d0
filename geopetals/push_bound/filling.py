"""The least computing with all servers of a set: one block each, the others where they take the least time."""

from itertools import pairwise

import numpy as np

from geopetals.problem import Floats, Ints
from geopetals.push_bound.graph import Graph


def filled_s(graph: Graph, sets: Ints, count: int) -> Floats:
    """(sets, L - count + 1): the time for count, ..., L blocks on each set of `count` servers; inf if they cannot."""
    order = np.argsort(graph.block_s, kind="stable")
    block_s = np.append(graph.block_s[order], np.inf)
    inside = (sets[:, None] >> order & 1).astype(np.int64)
    others = graph.num_blocks - count
    full_at = np.minimum(np.cumsum(inside * (graph.most[order] - 1), axis=1), others)
    rows = np.arange(len(sets))[:, None] * (others + 1)
    filled = np.bincount((rows + full_at).ravel(), minlength=len(sets) * (others + 1)).reshape(-1, others + 1)
    time_s = np.empty((len(sets), others + 1))
    time_s[:, 0] = inside @ block_s[:-1]
    time_s[:, 1:] = block_s[filled.cumsum(axis=1)[:, :-1]]
    return np.asarray(time_s.cumsum(axis=1))


def filling(graph: Graph, servers: list[int]) -> tuple[tuple[int, int], ...]:
    """(server, blocks) in the order given, with the least computing. The servers can hold all blocks."""
    left, blocks = graph.num_blocks - len(servers), {}
    for server in sorted(servers, key=lambda each: (graph.block_s[each], each)):
        more = min(left, int(graph.most[server]) - 1)
        blocks[server] = 1 + more
        left -= more
    return tuple((server, blocks[server]) for server in servers)


def path_s(graph: Graph, servers: list[int]) -> float:
    """The time of the path over these servers, with the least computing. Infinite if there are none."""
    if not servers:
        return float("inf")
    delay_s = graph.from_client_s[servers[0]] + graph.to_client_s[servers[-1]]
    delay_s += sum(graph.between_s[hop] for hop in pairwise(servers))
    return float(delay_s + sum(graph.block_s[server] * blocks for server, blocks in filling(graph, servers)))
