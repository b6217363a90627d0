"""How many blocks a server may hold and what that carries: the options among which a bound or an exact method chooses.

| section 6  | here           | shape  | meaning                                                                    |
| ---------- | -------------- | ------ | -------------------------------------------------------------------------- |
| m          | sizes[j]       |        | the numbers of blocks that server j may hold                               |
| slots_j(m) | slots[j]       |        | session-blocks whose caches fit beside them, for each of the sizes         |
| K          | most           |        | the most blocks of a server that one session may use, over all servers     |
|            | usable         | (J, K) | whether a session may use 1..K blocks of server j under one of its sizes   |
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geopetals.problem import Ints, Problem
from geopetals.timing import Objective


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sizes:
    """Ascending, per server; empty for a server that cannot carry a session or that no client reaches."""

    sizes: tuple[Ints, ...]
    slots: tuple[Ints, ...]

    @property
    def most(self) -> int:
        return max((int(sizes[-1]) for sizes in self.sizes if sizes.size), default=0)

    @property
    def usable(self) -> NDArray[np.bool_]:
        usable = np.zeros((len(self.sizes), self.most), dtype=bool)
        for server, (sizes, slots) in enumerate(zip(self.sizes, self.slots, strict=True)):
            if sizes.size:
                usable[server, : int(np.minimum(sizes, slots).max())] = True
        return usable


def useful_sizes(problem: Problem, sessions: Ints, objective: Objective) -> Sizes:
    """All sizes among which some optimum chooses, for `sessions` (C,) at once.

    A size that leaves fewer slots than blocks is left out: no session could use all its blocks, so the span can be cut
    at its start to what the longest use needs. Of the sizes with room for all sessions only the largest is needed: it
    offers the entries of the others too. A span that begins at block 0 is an exception to the latter, for whoever
    places the sizes: there the model ends before the size does.
    """
    options = [
        _of_server(problem, server, reach) for server, reach in enumerate(_reaching(problem, sessions, objective))
    ]
    return Sizes(sizes=tuple(sizes for sizes, _ in options), slots=tuple(slots for _, slots in options))


def _reaching(problem: Problem, sessions: Ints, objective: Objective) -> list[int]:
    """How many sessions each server may meet."""
    if objective == "push":
        return [int(sessions.sum())] * problem.num_servers
    reach = np.isfinite(problem.relay_decode_s) & np.isfinite(problem.relay_prefill_s)
    return [int(count) for count in sessions @ reach]


def _of_server(problem: Problem, server: int, reach: int) -> tuple[Ints, Ints]:
    pin = problem.pinned[server]
    sizes = np.arange(1, int(problem.max_blocks[server]) + 1) if pin is None else np.array([pin[1] - pin[0]])
    slots = server_slots(problem, server, sizes)
    if not reach:
        return sizes[:0], slots[:0]
    if pin is not None:
        return (sizes, slots) if slots[0] else (sizes[:0], slots[:0])
    fits = slots >= sizes
    sizes, slots = sizes[fits], slots[fits]
    roomy = int((slots >= reach * sizes).sum())
    return sizes[max(roomy - 1, 0) :], slots[max(roomy - 1, 0) :]


def server_slots(problem: Problem, server: int, sizes: Ints) -> Ints:
    """Problem.slots for one server and several sizes."""
    free = problem.memory_bytes[server] - problem.block_bytes * sizes
    slots: Ints = np.maximum(np.floor(free / problem.kv_bytes), 0).astype(np.int64)
    return slots
