"""The arcs of a placement: a server and the block at which it is entered. It is left at its end."""

from collections.abc import Sequence

import numpy as np

from geopetals.errors import NoChain
from geopetals.plan import Chain, Hop, Placement, spans_of
from geopetals.problem import Floats, Ints


class Arcs:
    """All arcs of a placement, sorted by (entry, end, server)."""

    def __init__(self, placement: Placement) -> None:
        held = placement.held
        server = np.repeat(np.arange(len(placement)), held)
        first = np.cumsum(held) - held
        entry = placement.starts[server] + np.arange(server.size) - first[server]
        order = np.lexsort((server, placement.ends[server], entry))
        self.num_blocks = placement.num_blocks
        self.server: Ints = server[order]
        self.entry: Ints = entry[order]
        self.end: Ints = placement.ends[self.server]
        self.blocks: Ints = self.end - self.entry
        self.length: Floats = self.blocks.astype(np.float64)
        position = np.empty_like(order)
        position[order] = np.arange(order.size)
        # Reversed, since the arc that uses one block is the one entered last.
        self.of_server = [position[low : low + count][::-1] for low, count in zip(first, held, strict=True)]
        """For each server its arcs by how many blocks they use: 1, 2, .., all."""
        self._hops: dict[int, Hop] = {}

    def __len__(self) -> int:
        return self.server.size

    def chain(self, arcs: Sequence[int]) -> Chain:
        return Chain(tuple([self._hop(arc) for arc in arcs]))

    def _hop(self, arc: int) -> Hop:
        if arc not in self._hops:
            self._hops[arc] = Hop(int(self.server[arc]), int(self.entry[arc]), int(self.end[arc]))
        return self._hops[arc]


def no_chain(arcs: Arcs, extra_s: Floats | None) -> NoChain:
    """The error that names the blocks without a server that may be used."""
    usable = np.ones(len(arcs), dtype=bool) if extra_s is None else np.isfinite(extra_s)
    missing = np.setdiff1d(np.arange(arcs.num_blocks), arcs.entry[usable])
    if not missing.size:
        return NoChain("The servers hold all blocks, but some cannot be reached: mend the links.")
    names = ", ".join(str(span) for span in spans_of(missing.tolist()))
    return NoChain(f"Blocks {names} of {arcs.num_blocks} have no server that may be used: add a server for them.")
