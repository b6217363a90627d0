"""Which servers a session goes through: the chain with the least time per token, as the client sees the swarm.

The cost of a hop is PETALS' relay model: one round trip from the client, and computing the blocks it takes over. A
server may be entered at any of its blocks and is left at its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from geopetals.errors import NoChain


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A server that answers: its blocks [start, end), round trip, time per block and token, price for avoiding it.

    `protocol` as in its record.
    """

    peer_id: str
    start: int
    end: int
    rtt_s: float
    block_s: float
    penalty_s: float = 0.0
    protocol: int = 0

    def cost_s(self, blocks: int) -> float:
        return self.rtt_s + self.penalty_s + self.block_s * blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One server of a chain and the blocks [start, end) it computes for the session.

    `protocol` as in its record. In the route of a session `mode` is how the hop's output leaves it: "push" to the next
    server, "relay" to the client who sends it on, or "answer" where it is what the client waits for. `why` says why it
    is relayed.
    """

    peer_id: str
    start: int
    end: int
    protocol: int = 0
    mode: Literal["push", "relay", "answer"] | None = None
    why: str = ""


def shortest_chain(candidates: Sequence[Candidate], num_blocks: int) -> tuple[Hop, ...]:
    """The cheapest chain over all blocks, in O(servers x blocks). Raises NoChain that names the missing blocks."""
    missing = [block for block in range(num_blocks) if not any(c.start <= block < c.end for c in candidates)]
    if missing:
        raise NoChain(f"{name_blocks(missing)} of {num_blocks} have no server: start one with `geopetals serve`.")
    best: list[float] = [0.0] * num_blocks + [0.0]
    choice: list[Candidate | None] = [None] * num_blocks
    for block in reversed(range(num_blocks)):
        holders = [c for c in candidates if c.start <= block < c.end]
        cheapest = min(holders, key=lambda c: (c.cost_s(c.end - block) + best[c.end], c.peer_id))
        best[block] = cheapest.cost_s(cheapest.end - block) + best[cheapest.end]
        choice[block] = cheapest
    hops, block = [], 0
    while block < num_blocks:
        server = choice[block]
        assert server is not None
        hops.append(Hop(peer_id=server.peer_id, start=block, end=server.end, protocol=server.protocol))
        block = server.end
    return tuple(hops)


def name_blocks(blocks: Sequence[int]) -> str:
    """`blocks 3:5, 9:12` for a sorted list."""
    spans: list[list[int]] = []
    for block in blocks:
        if spans and spans[-1][1] == block:
            spans[-1][1] = block + 1
        else:
            spans.append([block, block + 1])
    return "blocks " + ", ".join(f"{start}:{end}" for start, end in spans)
