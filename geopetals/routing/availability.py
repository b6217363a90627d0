"""From when on each arc of a swarm can be taken, kept up to date as sessions are booked and released."""

import numpy as np

from geopetals.plan import Chain
from geopetals.problem import Floats, Ints
from geopetals.routing.graph import Arcs
from geopetals.routing.ledger import Ledger


class Availability:
    """A ledger for each server, and what follows from them for sessions with one cache slot per block.

    For sessions that hold more slots per block, servers without room for another one are computed when they ask.
    """

    def __init__(self, slots: Ints, arcs: Arcs) -> None:
        self.ledgers = [Ledger(int(count)) for count in slots]
        self.gone: set[int] = set()
        self.lay_out(arcs)

    def lay_out(self, arcs: Arcs) -> None:
        """The servers hold other blocks from now on."""
        self._arcs_of = arcs.of_server
        self._held = np.array([of_server.size for of_server in self._arcs_of])
        self._free_from_s = np.full(len(arcs), -np.inf)
        self._free_of_server = [[-float("inf")] * of_server.size for of_server in self._arcs_of]
        self._waits_s = np.zeros_like(self._free_from_s)
        self._changed = set(range(len(self.ledgers)))

    def book(self, chain: Chain, slots_per_block: int, *, from_s: float | None, end_s: float) -> None:
        """from_s None: taken already now."""
        for hop in chain:
            self.ledgers[hop.server].book(hop.blocks * slots_per_block, from_s=from_s, end_s=end_s)
            self._changed.add(hop.server)

    def release(self, chain: Chain, slots_per_block: int, *, from_s: float | None, end_s: float) -> None:
        """The opposite of book with the same arguments."""
        for hop in chain:
            self.ledgers[hop.server].release(hop.blocks * slots_per_block, from_s=from_s, end_s=end_s)
            self._changed.add(hop.server)

    def lose(self, server: int) -> None:
        """Nobody can take the server any more."""
        self.gone.add(server)
        self._changed.add(server)

    def resize(self, server: int, slots: int) -> None:
        """The server has this many slots; it is back if it was lost."""
        self.gone.discard(server)
        self.ledgers[server].slots = slots
        self._changed.add(server)

    def waits_s(self, now: float, slots_per_block: int = 1) -> Floats:
        """(arcs,): how long until each can be taken; inf: never. The next call overwrites the array.

        For thousands of servers, a new array for each decision is slow to get.
        """
        self._refresh(now)
        free_from_s = self._free_from_s if slots_per_block == 1 else self._wide_free_from_s(slots_per_block)
        np.subtract(free_from_s, now, out=self._waits_s)
        return np.maximum(self._waits_s, 0.0, out=self._waits_s)

    def free_from_s(self, server: int, blocks: int, now: float, slots_per_block: int = 1) -> float:
        """The instant from which a session may use that many blocks of the server; -inf: always; inf: never."""
        self._refresh(now)
        of_server = self._free_of_server[server]
        if not blocks <= len(of_server):
            return float("inf")
        return of_server[blocks - 1] if slots_per_block == 1 else self._of_server(server, slots_per_block)[blocks - 1]

    def chain_free_from_s(self, chain: Chain, now: float, slots_per_block: int = 1) -> float:
        """The instant from which all hops of the chain may be used."""
        return max([self.free_from_s(hop.server, hop.end - hop.start, now, slots_per_block) for hop in chain])

    def _of_server(self, server: int, slots_per_block: int) -> list[float]:
        blocks, ledger = self._arcs_of[server].size, self.ledgers[server]
        if server in self.gone:
            return [float("inf")] * blocks
        # Only as many as it could ever hold: sessions of any size are asked for.
        possible = min(blocks, ledger.slots // slots_per_block)
        free_from_s = ledger.free_from(possible * slots_per_block)[slots_per_block - 1 :: slots_per_block]
        return free_from_s + [float("inf")] * (blocks - possible)

    def _wide_free_from_s(self, slots_per_block: int) -> Floats:
        free_from_s = np.full_like(self._free_from_s, -np.inf)
        taken = np.array([ledger.booked - ledger.slots for ledger in self.ledgers])
        short = np.flatnonzero(taken + self._held * slots_per_block > 0).tolist()
        servers = [*short, *self.gone.difference(short)]
        if servers:
            values: list[float] = []
            for server in servers:
                values += self._of_server(server, slots_per_block)
            free_from_s[np.concatenate([self._arcs_of[server] for server in servers])] = values
        return free_from_s

    def _refresh(self, now: float) -> None:
        """Bring the servers that changed since the last decision up to date."""
        if not self._changed:
            return
        arcs, values = [], []
        for server in self._changed:
            self.ledgers[server].forget_starts(now)
            free = self._of_server(server, 1)
            if free != self._free_of_server[server]:
                self._free_of_server[server] = free
                arcs.append(self._arcs_of[server])
                values += free
        self._changed.clear()
        if arcs:
            self._free_from_s[np.concatenate(arcs)] = values
