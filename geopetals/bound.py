"""The bound for reports: the least time per token that a session alone could get under any placement memory allows.

Only network delay and computing count, no software overhead. Efficiency is this bound over the time per token achieved.

* Relay: a chain costs the same in any order of its servers, so it is a knapsack in which each server has a fixed charge
  t_cj, costs tau_j per block, and holds at most as many blocks as fit beside one session's caches. Exact by dynamic
  programming in O(J L) windows.
* Push: the order matters. Exact by search for up to 25 servers (push_bound). Beyond, or where the search is
  stopped, it is a lower bound, and the method names which.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.placement.cg_bp import blocks_to_hold
from geopetals.problem import Floats, Ints, OneWayDelays, Problem
from geopetals.push_bound import cheapest_path
from geopetals.timing import Objective

Method = Literal[
    "exact",
    "lower bound: servers may be used again",
    "lower bound: the search was stopped",
    "lower bound: pinned servers may move",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """No chain of any placement has a decode step shorter than decode_s."""

    decode_s: float
    method: Method
    reached_s: float
    """The time of the best chain found: decode_s itself where the method is exact; infinite if none was looked for."""
    blocks_of: tuple[tuple[int, int], ...]
    """(server, blocks) of that chain; for push in order."""


def decode_bound(problem: Problem, client: int, *, objective: Objective = "relay", overhead_s: float = 0.0) -> Bound:
    """For one client. overhead_s: the software's share of each delay of the problem, which is taken off.

    Raises MemoryShortage if all servers together cannot hold the model and one session.
    """
    most = np.where(np.isfinite(_reach_s(problem, client, objective)), blocks_to_hold(problem, 1), 0)
    if most.sum() < problem.num_blocks:
        raise MemoryShortage(
            f"All servers that client {client} can reach hold {most.sum()} of {problem.num_blocks} blocks: add servers."
        )
    if objective == "relay":
        delay_s = np.maximum(problem.relay_decode_s[client] - overhead_s, 0)
        bound = cheapest_knapsack(delay_s, problem.decode_block_s, most, problem.num_blocks)
    else:
        bound = _push_bound(problem, client, most, overhead_s)
    if any(pin is not None for pin in problem.pinned):
        return replace(bound, method="lower bound: pinned servers may move", reached_s=float("inf"), blocks_of=())
    return bound


def cheapest_knapsack(delay_s: Floats, block_s: Floats, most: Ints, num_blocks: int) -> Bound:
    """The cheapest way to share num_blocks among servers; server j takes 0, or 1 to most[j] blocks. Arrays (J,)."""
    blocks = np.arange(num_blocks + 1)
    best_s = np.full(num_blocks + 1, np.inf)
    best_s[0] = 0.0
    taken: list[tuple[int, Ints]] = []
    for server in np.flatnonzero((most > 0) & np.isfinite(delay_s)).tolist():
        limit = min(int(most[server]), num_blocks)
        # With the blocks' own cost set aside, the best start is the cheapest of the `limit` fillings just below.
        apart_s = best_s - block_s[server] * blocks
        windows = sliding_window_view(np.concatenate([np.full(limit - 1, np.inf), apart_s[:-1]]), limit)
        chosen = windows.argmin(axis=1)
        with_server_s = delay_s[server] + block_s[server] * blocks[1:] + windows[blocks[:-1], chosen]
        better = with_server_s < best_s[1:]
        best_s[1:][better] = with_server_s[better]
        taken.append((server, np.concatenate([[0], np.where(better, limit - chosen, 0)])))
    shares, left = [], num_blocks
    for server, counts in reversed(taken):
        if counts[left]:
            shares.append((server, int(counts[left])))
            left -= int(counts[left])
    least_s = float(best_s[-1])
    return Bound(decode_s=least_s, method="exact", reached_s=least_s, blocks_of=tuple(shares))


def _reach_s(problem: Problem, client: int, objective: Objective) -> Floats:
    if objective == "relay":
        return np.asarray(problem.relay_decode_s[client])
    return np.zeros(problem.num_servers)


def _push_bound(problem: Problem, client: int, most: Ints, overhead_s: float) -> Bound:
    if problem.push is None:
        raise UnsupportedInput("The delays between servers are not known: give them, or ask for the bound of relay.")
    used = np.flatnonzero(most)
    delays = _without_overhead(problem.push.decode, used, client, overhead_s)
    found = cheapest_path(delays, problem.decode_block_s[used], most[used], problem.num_blocks)
    method: Method = "exact" if found.least_s == found.reached_s else "lower bound: the search was stopped"
    if not found.searched:
        method = "lower bound: servers may be used again"
    servers = tuple((int(used[server]), blocks) for server, blocks in found.path)
    return Bound(decode_s=found.least_s, method=method, reached_s=found.reached_s, blocks_of=servers)


def _without_overhead(delays: OneWayDelays, used: Ints, client: int, overhead_s: float) -> OneWayDelays:
    between_s = np.maximum(delays.between_s[np.ix_(used, used)] - overhead_s, 0)
    np.fill_diagonal(between_s, np.inf)
    return OneWayDelays(
        from_client_s=np.maximum(delays.from_client_s[[client]][:, used] - overhead_s, 0),
        between_s=between_s,
        to_client_s=np.maximum(delays.to_client_s[used][:, [client]] - overhead_s, 0),
    )
