"""A placement that is being changed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geopetals.plan import Placement

Change = list[tuple[int, int, int]]
"""(server, start, end): new spans of some servers."""


@dataclass(slots=True)
class Spans:
    """Starts and ends of all servers, and what the placement costs, the price of moving included."""

    starts: list[int]
    ends: list[int]
    cost_s: float

    def copy(self) -> "Spans":
        return Spans(self.starts[:], self.ends[:], self.cost_s)

    def placement(self, num_blocks: int) -> Placement:
        return Placement(num_blocks=num_blocks, starts=np.array(self.starts), ends=np.array(self.ends))


@dataclass(frozen=True, slots=True, kw_only=True)
class Moving:
    """What it costs that servers load blocks which they do not hold yet."""

    starts: Sequence[int]
    ends: Sequence[int]
    block_s: float
    """For each block that a server loads."""

    def server_s(self, server: int, start: int, end: int) -> float:
        kept = max(min(end, self.ends[server]) - max(start, self.starts[server]), 0)
        return (end - start - kept) * self.block_s

    def total_s(self, starts: Sequence[int], ends: Sequence[int]) -> float:
        spans = enumerate(zip(starts, ends, strict=True))
        return sum(self.server_s(server, start, end) for server, (start, end) in spans)


def no_moving(servers: int) -> Moving:
    """Loading blocks is free."""
    return Moving(starts=[0] * servers, ends=[0] * servers, block_s=0.0)
