"""Placement and routing as one integer program: sessions flow from block 0 to block L over arcs of the spans chosen.

| variable     | meaning                                                                                          |
| ------------ | ------------------------------------------------------------------------------------------------ |
| z[j, e, m]   | server j holds the m blocks that end at e (binary)                                               |
| f[c, j, e, k]| sessions of client c that use the last k blocks of server j, which ends at e (integer)           |
| y[c, i, j, b]| push only: sessions of client c that go from server i, which ends at b, to server j              |

For every end e and depth k the sessions that use k blocks or more need a span at least as long:
    sum_{k' >= k} f <= sum_{m >= k} min(R, floor(slots_j(m) / k)) z,
and their caches need room, sum_{k' >= k} k' f <= sum_{m >= k} slots_j(m) z. The first with 1 for k and the second with
the least k would do; the others bring the linear relaxation near the optimum.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from geopetals.placement.bounds.sizes import Sizes, server_slots
from geopetals.placement.exact.chains import chains_of
from geopetals.placement.exact.program import Program
from geopetals.plan import Chain, Hop, Placement
from geopetals.problem import Floats, Ints, Problem
from geopetals.timing import HopCosts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Options:
    """What the program may choose from; what cannot be part of a solution cheap enough is left out."""

    spans: tuple[tuple[tuple[int, int], ...], ...]
    """For each server the spans (start, end) that it may hold."""
    most_flow: Ints
    """(C, J, K): how many sessions of the client may use 1..K blocks of the server."""


def all_spans(problem: Problem, sizes: Sizes, kept: list[NDArray[np.bool_]]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Every position of every size kept. Where the model begins, shorter spans stand for the smallest size."""
    return tuple(
        _spans(problem.num_blocks, problem.pinned[server], sizes.sizes[server], kept[server])
        for server in range(problem.num_servers)
    )


def _spans(
    blocks: int, pin: tuple[int, int] | None, sizes: Ints, kept: NDArray[np.bool_]
) -> tuple[tuple[int, int], ...]:
    if pin is not None:
        return (pin,)
    spans = [(end - size, end) for size in sizes[kept].tolist() for end in range(size, blocks + 1)]
    if sizes.size and kept[0]:
        spans += [(0, end) for end in range(1, int(sizes[0]))]
    return tuple(spans)


class ArcFlow:
    """The program, and how to read its solutions."""

    def __init__(self, problem: Problem, costs: HopCosts, sessions: Ints, options: Options) -> None:
        self._problem, self._costs, self._sessions = problem, costs, sessions
        self.program = Program()
        self.spans: dict[tuple[int, int, int], int] = {}
        """(server, start, end): the number of z."""
        self.flows: dict[tuple[int, int, int, int], int] = {}
        """(client, server, end, blocks used): the number of f."""
        self._links: dict[tuple[int, int, int, int], int] = {}
        """(client, server, next server, block): the number of y."""
        for server, spans in enumerate(options.spans):
            self._add_server(server, spans, options.most_flow[:, server])
        if costs.push is None:
            self._conserve()
        else:
            self._conserve_by_server(costs.push.between_s)

    def _add_server(self, server: int, spans: tuple[tuple[int, int], ...], most_flow: Ints) -> None:
        if not spans:
            return
        held = [self.program.variable(0.0, 1.0) for _ in spans]
        self.spans.update({(server, *span): number for span, number in zip(spans, held, strict=True)})
        fixed = self._problem.pinned[server] is not None
        self.program.row([(number, 1.0) for number in held], least=1.0 if fixed else -math.inf, most=1.0)
        for end in sorted({end for _, end in spans}):
            sizes = sorted(end - start for start, stop in spans if stop == end)
            self._add_end(server, end, np.array(sizes), most_flow)

    def _add_end(self, server: int, end: int, sizes: Ints, most_flow: Ints) -> None:
        slots = server_slots(self._problem, server, sizes)
        held = [self.spans[server, end - size, end] for size in sizes.tolist()]
        arcs: dict[int, list[tuple[int, int]]] = {}
        """By blocks used: client and variable."""
        for used in range(1, int(np.minimum(sizes, slots).max()) + 1):
            for client in range(self._sessions.size):
                limit = int(most_flow[client, used - 1])
                cost_s = self._hop_s(client, server, end, used)
                if limit and np.isfinite(cost_s):
                    number = self.program.variable(cost_s, limit)
                    self.flows[client, server, end, used] = number
                    arcs.setdefault(used, []).append((client, number))
        for used in arcs:
            self._tie(used, arcs, sizes, slots, held)

    def _tie(
        self, used: int, arcs: dict[int, list[tuple[int, int]]], sizes: Ints, slots: Ints, held: list[int]
    ) -> None:
        deep = [(blocks, client, number) for blocks, each in arcs.items() if blocks >= used for client, number in each]
        room = [(number, int(free)) for number, size, free in zip(held, sizes, slots, strict=True) if size >= used]
        total = int(self._sessions.sum())
        carried = [(number, -float(min(free // used, total))) for number, free in room]
        self.program.row([(number, 1.0) for _, _, number in deep] + carried, most=0.0)
        self.program.row(
            [(number, float(blocks)) for blocks, _, number in deep] + [(number, -float(free)) for number, free in room],
            most=0.0,
        )
        if self._sessions.size > 1:
            for client, sessions in enumerate(self._sessions.tolist()):
                mine = [(number, 1.0) for _, owner, number in deep if owner == client]
                self.program.row(
                    mine + [(number, -float(min(free // used, sessions))) for number, free in room], most=0.0
                )

    def _hop_s(self, client: int, server: int, end: int, used: int) -> float:
        compute_s = float(self._costs.block_s[server]) * used
        if self._costs.push is not None:
            first_s = float(self._costs.push.from_client_s[client, server]) if used == end else 0.0
            last = end == self._problem.num_blocks
            last_s = float(self._costs.push.to_client_s[server, client]) if last else 0.0
            return compute_s + first_s + last_s
        relay_s = self._costs.relay_s
        return compute_s + (0.0 if relay_s is None else float(relay_s[client, server]))

    def _conserve(self) -> None:
        """What comes to a block goes on from it."""
        blocks = self._problem.num_blocks
        terms: dict[tuple[int, int], list[tuple[int, float]]] = {
            (client, block): [] for client in range(self._sessions.size) for block in range(blocks + 1)
        }
        for (client, _, end, used), number in self.flows.items():
            terms[client, end - used].append((number, 1.0))
            terms[client, end].append((number, -1.0))
        for (client, block), mine in terms.items():
            supply = float(self._sessions[client]) * ((block == 0) - (block == blocks))
            self.program.row(mine, least=supply, most=supply)

    def _conserve_by_server(self, between_s: Floats) -> None:
        """What leaves a server enters another at the same block."""
        blocks = self._problem.num_blocks
        entered: dict[tuple[int, int, int], list[tuple[int, float]]] = {}
        left: dict[tuple[int, int, int], list[tuple[int, float]]] = {}
        for (client, server, end, used), number in self.flows.items():
            entered.setdefault((client, end - used, server), []).append((number, -1.0))
            left.setdefault((client, end, server), []).append((number, -1.0))
        for client, sessions in enumerate(self._sessions.tolist()):
            first = [term for (c, block, _), mine in entered.items() if c == client and block == 0 for term in mine]
            self.program.row(first, least=-float(sessions), most=-float(sessions))
        arriving: dict[int, list[tuple[int, int]]] = {}
        for client, block, server in entered:
            arriving.setdefault(block, []).append((client, server))
        for (client, block, server), mine in left.items():
            for owner, other in arriving.get(block, []) if block < blocks else []:
                delay_s = float(between_s[server, other])
                if owner == client and other != server and np.isfinite(delay_s):
                    link = self.program.variable(delay_s, float(self._sessions[client]))
                    self._links[client, server, other, block] = link
                    mine.append((link, 1.0))
                    entered[client, block, other].append((link, 1.0))
        for (_, block, _), mine in left.items():
            if block < blocks:
                self.program.row(mine, least=0.0, most=0.0)
        for (_, block, _), mine in entered.items():
            if block:
                self.program.row(mine, least=0.0, most=0.0)

    def hint(self, placement: Placement, chains: tuple[tuple[Chain, ...], ...]) -> None:
        """Start from this solution, as far as it is part of the program."""
        values = dict.fromkeys(range(len(self.program.costs)), 0.0)
        for server in range(len(placement)):
            number = self.spans.get((server, int(placement.starts[server]), int(placement.ends[server])))
            if number is not None:
                values[number] = 1.0
        for client, mine in enumerate(chains):
            for chain in mine:
                self._hint_chain(client, chain, values)
        self.program.hints = values

    def _hint_chain(self, client: int, chain: Chain, values: dict[int, float]) -> None:
        flows = [self.flows.get((client, hop.server, hop.end, hop.blocks)) for hop in chain]
        links = [self._links.get((client, here.server, there.server, here.end)) for here, there in pairwise(chain)]
        for number in flows + links:
            if number is not None:
                values[number] += 1.0

    def placement(self, values: Floats) -> Placement:
        spans: list[tuple[int, int] | None] = [None] * self._problem.num_servers
        for (server, start, end), number in self.spans.items():
            if values[number]:
                spans[server] = (start, end)
        return Placement.of(spans, self._problem.num_blocks)

    def chains(self, values: Floats) -> tuple[tuple[Chain, ...], ...]:
        """For each client a chain per session."""
        found = []
        for client, sessions in enumerate(self._sessions.tolist()):
            hops = {
                Hop(server, end - used, end): int(values[number])
                for (owner, server, end, used), number in self.flows.items()
                if owner == client and values[number]
            }
            links = {
                (here, there): int(values[number])
                for (owner, here, there, _), number in self._links.items()
                if owner == client and values[number]
            }
            pushed = None if self._costs.push is None else links
            found.append(chains_of(sessions, hops, pushed, self._problem.num_blocks))
        return tuple(found)
