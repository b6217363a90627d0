"""CG-BP, conservative greedy block placement: the paper's algorithm 1, over all servers in O(servers x blocks) windows.

| paper    | here          | meaning                                                                   |
| -------- | ------------- | ------------------------------------------------------------------------- |
| R        | sessions      | design load: sessions that may be in progress at the same time            |
| m_j, a_j | placement     | number of blocks and first block of server j                              |
| f_j      | capacity      | sessions whose caches fit on j over all its blocks                        |
| t_j      | hop_s         | the largest delay over the clients, and computing all m_j blocks          |
| t~_j     | amortized_s   | t_j / m_j                                                                 |
| C_b      | served        | sessions that the servers placed so far carry on block b                  |
| T_b      | deficit       | how much block b still gains from one more server                         |
| K        | servers_used  | servers placed when every block first carries R sessions                  |
"""

from dataclasses import dataclass

import numpy as np

from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.placement.windows import largest_sum, ranks, weakest
from geopetals.plan import Placement, spans_of
from geopetals.problem import Floats, Ints, Problem
from geopetals.units import in_units

MARGIN_S = 1e-3
"""t* is this much above the largest t~: the paper adds 1 to milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CgBp:
    """A placement under which `sessions` at once can each take a shortest path without any cache running out."""

    placement: Placement
    sessions: int
    order: tuple[int, ...]
    """The servers in the order in which they were placed: fastest per block first."""
    servers_used: int
    bound_s: float | None
    """No decode step takes longer by relay (offline, at most `sessions` at once). None with pins or own delays."""


def cg_bp(problem: Problem, sessions: int, *, delay_s: Floats | None = None) -> CgBp:
    """Place for `sessions` at once, at least 1. Raises MemoryShortage that names the blocks which lack caches.

    delay_s, (J,): what a hop to each server costs beside computing; by default the largest round trip over the clients.
    """
    if sessions < 1:
        raise UnsupportedInput(f"A placement for {sessions} sessions makes no sense: plan for at least one.")
    held = blocks_to_hold(problem, sessions)
    capacity = np.where(held > 0, problem.slots(held) // np.maximum(held, 1), 0)
    hop_s = (_farthest_client_s(problem) if delay_s is None else delay_s) + problem.decode_block_s * held
    held = np.where(np.isfinite(hop_s) | _pinned(problem), held, 0)
    amortized_s = np.where(held > 0, hop_s / np.maximum(held, 1), 0.0)
    order = _order(problem, held, amortized_s)
    starts, served, servers_used = _place(problem, sessions, order, held, capacity, amortized_s)
    if (served < sessions).any():
        raise _shortage(problem, sessions, served)
    placement = Placement(num_blocks=problem.num_blocks, starts=starts, ends=starts + held)
    guaranteed = delay_s is None and not _pinned(problem).any()
    bound_s = _bound_s(problem, order[:servers_used], held, hop_s) if guaranteed else None
    return CgBp(
        placement=placement,
        sessions=sessions,
        order=tuple(order.tolist()),
        servers_used=servers_used,
        bound_s=bound_s,
    )


def blocks_to_hold(problem: Problem, sessions: int) -> Ints:
    """m_j, (J,): as many blocks as leave room for the caches of all sessions; 0 for a server too small for one."""
    fitting = np.floor(problem.memory_bytes / (problem.block_bytes + problem.kv_bytes * sessions))
    held = np.minimum(fitting, problem.max_blocks).astype(np.int64)
    for server, span in enumerate(problem.pinned):
        if span is not None:
            held[server] = span[1] - span[0]
    return held


def _farthest_client_s(problem: Problem) -> Floats:
    return np.asarray(problem.relay_decode_s.max(axis=0))


def _pinned(problem: Problem) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.array([span is not None for span in problem.pinned])


def _order(problem: Problem, held: Ints, amortized_s: Floats) -> Ints:
    """Pinned servers first, since what they hold is known; then the fastest per block."""
    order = np.lexsort((ranks(amortized_s), ~_pinned(problem)))
    return np.asarray(order[held[order] > 0])


def _place(
    problem: Problem, sessions: int, order: Ints, held: Ints, capacity: Ints, amortized_s: Floats
) -> tuple[Ints, Ints, int]:
    """Starts (J,), sessions served on each block (L,), and after how many servers every block was served in full."""
    finite = amortized_s[order][np.isfinite(amortized_s[order])]
    slowest_s = float(finite.max(initial=0.0)) + MARGIN_S
    served = np.zeros(problem.num_blocks, dtype=np.int64)
    deficit = np.full(problem.num_blocks, sessions * slowest_s)
    starts = np.zeros(problem.num_servers, dtype=np.int64)
    servers_used, complete = order.size, False
    for count, server in enumerate(order.tolist(), start=1):
        blocks, carries = int(held[server]), int(capacity[server])
        pin = problem.pinned[server]
        start = _best_start(served, deficit, sessions, blocks, complete=complete) if pin is None else pin[0]
        starts[server] = start
        window = slice(start, start + blocks)
        if not complete:
            gain_s = max(slowest_s - float(amortized_s[server]), 0.0)
            deficit[window] -= gain_s * np.minimum(np.maximum(sessions - served[window], 0), carries)
        served[window] += carries
        if not complete and served.min() >= sessions:
            servers_used, complete = count, True
    return starts, served, servers_used


def _best_start(served: Ints, deficit: Floats, sessions: int, blocks: int, *, complete: bool) -> int:
    if complete:
        return weakest(served, blocks)
    lacking = np.zeros(served.size + 1, dtype=np.int64)
    np.cumsum(served < sessions, out=lacking[1:])
    return largest_sum(deficit, blocks, lacking[blocks:] > lacking[:-blocks])


def _bound_s(problem: Problem, used: Ints, held: Ints, hop_s: Floats) -> float:
    surplus = int(held[used].sum()) - problem.num_blocks
    return float(hop_s[used].sum() - problem.decode_block_s[used[-1]] * surplus)


def _shortage(problem: Problem, sessions: int, served: Ints) -> MemoryShortage:
    lacking = np.flatnonzero(served < sessions)
    bare = [str(span) for span in spans_of(lacking.tolist())]
    # A block that nobody holds needs its weights too; the others only caches.
    unheld = int((served[lacking] == 0).sum())
    missing = problem.kv_bytes * float((sessions - served[lacking]).sum()) + problem.block_bytes * unheld
    return MemoryShortage(
        f"Blocks {', '.join(bare)} cannot carry {sessions} sessions at once: add servers with at least "
        f"{in_units(missing)} of memory, or plan for fewer sessions."
    )
