"""Stock PETALS' placement, as the baseline: each server, when it joins, takes the window with the least throughput.

| PETALS                      | here                    | meaning                                                     |
| --------------------------- | ----------------------- | ----------------------------------------------------------- |
| num_blocks                  | blocks_to_hold          | (M - 2 GiB d_model / 14336) / (s_m + cache for 4096 tokens) |
| attn_cache_tokens           | CACHE_TOKENS            | 16384 over the group count where heads are grouped          |
| throughput                  | announced_rps           | what the server adds to each of its blocks                  |
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geopetals.errors import UnsupportedInput
from geopetals.placement.windows import ranks, weakest
from geopetals.plan import Placement
from geopetals.problem import Floats, Ints, Problem

CACHE_TOKENS = 4096
GROUPED_CACHE_TOKENS = 16384
AUTOGRAD_BYTES = 2 * 2**30
"""What PETALS sets aside for a model of hidden size 14336; in proportion for others."""
_AUTOGRAD_HIDDEN = 14336
_BYTES_PER_VALUE = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PetalsServers:
    """What PETALS' rules need beyond the Problem."""

    hidden_size: int
    forward_rps: Floats
    """(J,): tokens per second through one block."""
    network_rps: Floats
    """(J,): tokens per second over its link."""
    kv_groups: int = 1
    """Query heads per key-value head."""

    @property
    def cache_bytes(self) -> float:
        """Attention cache that a server sets aside for each of its blocks."""
        tokens = CACHE_TOKENS if self.kv_groups <= 1 else GROUPED_CACHE_TOKENS / self.kv_groups
        return 2 * self.hidden_size * _BYTES_PER_VALUE * tokens

    def announced_rps(self, held: Ints) -> Floats:
        """(J,): for online use; a request takes half of the server's blocks on average."""
        return np.asarray(np.minimum(self.forward_rps / ((1 + held) / 2), self.network_rps))


def blocks_to_hold(problem: Problem, servers: PetalsServers) -> Ints:
    """(J,): as many blocks as fit with their caches, within the limits of the problem; pinned ones keep theirs."""
    usable = problem.memory_bytes - AUTOGRAD_BYTES * servers.hidden_size / _AUTOGRAD_HIDDEN
    fitting = np.floor(np.maximum(usable, 0) / (problem.block_bytes + servers.cache_bytes))
    held = np.minimum(fitting, problem.max_blocks).astype(np.int64)
    for server, pin in enumerate(problem.pinned):
        if pin is not None:
            held[server] = pin[1] - pin[0]
    return held


def cache_slots(problem: Problem, servers: PetalsServers, held: Ints) -> Ints:
    """(J,): a stock server has the cache of its own budget, not all memory that its blocks leave."""
    slots: Ints = np.floor(held * servers.cache_bytes / problem.kv_bytes).astype(np.int64)
    return slots


def petals_placement(problem: Problem, held: Ints, rps: Floats, join_order: Sequence[int]) -> Placement:
    """The windows in which the servers settle, in the order in which they join; pinned servers are there before.

    held and rps, (J,): blocks of each server, and what it adds to the throughput of each. Blocks may stay without a
    server: see Placement.gaps.
    """
    if sorted(join_order) != sorted(set(join_order)) or not set(join_order) <= set(range(problem.num_servers)):
        raise UnsupportedInput("join_order names a server twice, or one that does not exist: give each at most once.")
    throughput = np.zeros(problem.num_blocks)
    starts = np.zeros(problem.num_servers, dtype=np.int64)
    ends = np.zeros_like(starts)
    for server in sorted(join_order, key=lambda s: problem.pinned[s] is None):
        blocks, pin = int(held[server]), problem.pinned[server]
        if not blocks:
            continue
        start = weakest(ranks(throughput), blocks) if pin is None else pin[0]
        starts[server], ends[server] = start, start + blocks
        throughput[start : start + blocks] += rps[server]
    return Placement(num_blocks=problem.num_blocks, starts=starts, ends=ends)
