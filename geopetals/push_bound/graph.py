"""What the search walks on: delays, and which orders of interchangeable servers it may leave out."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from geopetals.problem import Floats, Ints, OneWayDelays


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """One client and J servers. Sets of servers are integers: bit j stands for server j."""

    from_client_s: Floats
    """(J,)"""
    between_s: Floats
    """(J, J), infinite on the diagonal and where from_delays leaves an order out."""
    to_client_s: Floats
    """(J,)"""
    block_s: Floats
    most: Ints
    num_blocks: int
    needs: Ints
    """(J,): j need not be used without all servers of this set, nor before them."""
    bars: Ints
    """(J,): j need not come after any server of this set."""

    @classmethod
    def from_delays(cls, delays: OneWayDelays, block_s: Floats, most: Ints, num_blocks: int) -> Self:
        """For the first client of `delays`, whose between_s is infinite on the diagonal.

        Servers with equal delays to and from all others can be exchanged in any path. So they need to come only in one
        order, by the time per block, and none without all those that are at least as fast and as large.
        """
        from_client_s, to_client_s = delays.from_client_s[0], delays.to_client_s[:, 0]
        most = np.minimum(most, num_blocks)
        alike = _alike(from_client_s, delays.between_s, to_client_s)
        rank = np.empty(block_s.size, dtype=np.int64)
        rank[np.lexsort((-most, block_s))] = np.arange(block_s.size)
        later = alike & (rank[:, None] > rank)
        return cls(
            from_client_s=from_client_s,
            between_s=np.where(later, np.inf, delays.between_s),
            to_client_s=to_client_s,
            block_s=block_s,
            most=most,
            num_blocks=num_blocks,
            needs=_as_sets(later & (block_s[:, None] >= block_s) & (most[:, None] <= most)),
            bars=_as_sets(later.T),
        )


def _alike(from_client_s: Floats, between_s: Floats, to_client_s: Floats) -> NDArray[np.bool_]:
    """(J, J): whether all delays stay as they are when the two servers are exchanged."""
    servers = np.arange(from_client_s.size)
    alike = (from_client_s[:, None] == from_client_s) & (to_client_s[:, None] == to_client_s)
    alike &= between_s == between_s.T
    for one, other in zip(*np.nonzero(np.triu(alike, 1)), strict=True):
        third = (servers != one) & (servers != other)
        same = between_s[one] == between_s[other], between_s[:, one] == between_s[:, other]
        alike[one, other] = alike[other, one] = bool((same[0] & same[1])[third].all())
    return np.asarray(alike)


def _as_sets(members: NDArray[np.bool_]) -> Ints:
    """One set per row."""
    return np.asarray(members @ (1 << np.arange(members.shape[1])), dtype=np.int64)
