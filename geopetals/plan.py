"""The answers as data: which server holds which blocks, which servers a session goes through, when it starts.

Servers and clients are indices into the arrays of a Problem. Spans of blocks are half-open, [start, end), from 0.
The paper counts blocks from 1: its a_j (first block) is starts[j] + 1, its m_j held[j], its e_j (the block after the
last) ends[j] + 1.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from geopetals.errors import BlocksError, MemoryShortage
from geopetals.problem import Floats, Ints, Problem


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks [start, end), at least one."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise BlocksError(f"[{self.start}, {self.end}) is no span of blocks: give 0 <= start < end.")

    @property
    def blocks(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """The span of every server, (J,) each; a server that holds nothing has start = end = 0."""

    num_blocks: int
    starts: Ints
    ends: Ints

    def __post_init__(self) -> None:
        for name in ("starts", "ends"):
            values = np.array(getattr(self, name), dtype=np.int64)
            values.flags.writeable = False
            object.__setattr__(self, name, values)
        if self.starts.ndim != 1 or self.starts.shape != self.ends.shape:
            raise BlocksError(f"starts {self.starts.shape} and ends {self.ends.shape} differ: give each server a span.")
        empty = (self.starts == 0) & (self.ends == 0)
        valid = (self.starts >= 0) & (self.starts < self.ends) & (self.ends <= self.num_blocks)
        if not (empty | valid).all():
            server = int(np.flatnonzero(~(empty | valid))[0])
            raise BlocksError(
                f"Server {server} has [{self.starts[server]}, {self.ends[server]}): choose a span inside the model's "
                f"{self.num_blocks} blocks."
            )

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int] | Span | None], num_blocks: int) -> "Placement":
        """From a span for each server, None for a server that holds nothing."""
        pairs = [(0, 0) if s is None else (s.start, s.end) if isinstance(s, Span) else s for s in spans]
        starts, ends = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return cls(num_blocks=num_blocks, starts=starts, ends=ends)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            self.num_blocks == other.num_blocks
            and np.array_equal(self.starts, other.starts)
            and np.array_equal(self.ends, other.ends)
        )

    def __hash__(self) -> int:
        return hash((self.num_blocks, self.starts.tobytes(), self.ends.tobytes()))

    def __len__(self) -> int:
        return self.starts.size

    @property
    def held(self) -> Ints:
        """(J,): how many blocks each server holds."""
        return self.ends - self.starts

    def span(self, server: int) -> Span | None:
        start, end = int(self.starts[server]), int(self.ends[server])
        return Span(start, end) if start < end else None

    def replicas(self) -> Ints:
        """(L,): how many servers hold each block."""
        change = np.zeros(self.num_blocks + 1, dtype=np.int64)
        np.add.at(change, self.starts, 1)
        np.add.at(change, self.ends, -1)
        return np.cumsum(change)[:-1]

    def gaps(self) -> tuple[Span, ...]:
        """The blocks that no server holds, as maximal spans."""
        return spans_of(np.flatnonzero(self.replicas() == 0).tolist())

    def covers(self) -> bool:
        """Whether every block has a server."""
        return bool((self.replicas() > 0).all())

    def weight_bytes(self, problem: Problem) -> Floats:
        """(J,): memory taken by blocks."""
        return np.asarray(problem.block_bytes * self.held, dtype=np.float64)

    def check(self, problem: Problem) -> None:
        """Raises BlocksError or MemoryShortage unless the servers can hold their spans, and pinned ones stay."""
        if len(self) != problem.num_servers or self.num_blocks != problem.num_blocks:
            raise BlocksError(
                f"The placement is for {len(self)} servers and {self.num_blocks} blocks, the problem has "
                f"{problem.num_servers} and {problem.num_blocks}: plan again."
            )
        for server, pin in enumerate(problem.pinned):
            if pin is not None and pin != (self.starts[server], self.ends[server]):
                raise BlocksError(f"Server {server} is pinned to [{pin[0]}, {pin[1]}): keep that span.")
        over = np.flatnonzero(self.held > problem.max_blocks)
        if over.size:
            raise BlocksError(f"Server {over[0]} holds more than its limit of {problem.max_blocks[over[0]]} blocks.")
        short = np.flatnonzero(self.weight_bytes(problem) > problem.memory_bytes)
        if short.size:
            raise MemoryShortage(f"The blocks of server {short[0]} do not fit in its memory: give it fewer blocks.")


@dataclass(frozen=True, slots=True)
class Hop:
    """One server of a chain and the blocks [start, end) that it computes for the session."""

    server: int
    start: int
    end: int

    @property
    def blocks(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Chain:
    """The servers of a session in order; each begins at the block at which the one before it ended."""

    hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        if not self.hops:
            raise BlocksError("A chain needs at least one server.")
        block = self.hops[0].start
        for hop in self.hops:
            if hop.start != block or hop.end <= block:
                raise BlocksError(f"{hop} does not go on at block {block}: a chain is without gaps.")
            block = hop.end

    @property
    def servers(self) -> tuple[int, ...]:
        return tuple(hop.server for hop in self.hops)

    @property
    def start(self) -> int:
        return self.hops[0].start

    @property
    def end(self) -> int:
        return self.hops[-1].end

    def __iter__(self) -> Iterator[Hop]:
        return iter(self.hops)

    def __len__(self) -> int:
        return len(self.hops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What the router decides for one session; nothing is held yet. Times are on the caller's clock, in seconds."""

    client: int
    chain: Chain
    wait_s: float
    """From the decision until the session may start."""
    start_s: float
    end_s: float
    """The predicted completion: start plus constants, prefill and all decode steps."""
    cost_s: float
    """What was minimised: cost and waiting summed over the hops."""
    slots_per_block: int = 1
    """Caches of the workload's size that the session holds for each block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A session admitted: on each server of its chain, cache for the blocks it uses there, until end_s or release."""

    number: int
    route: Route
    held_from_s: float
    """When the caches count as taken: the start, in the paper's accounting the arrival."""
    end_s: float


def spans_of(blocks: Iterable[int]) -> tuple[Span, ...]:
    """Maximal spans of an ascending sequence of blocks."""
    spans: list[tuple[int, int]] = []
    for block in blocks:
        if spans and spans[-1][1] == block:
            spans[-1] = (spans[-1][0], block + 1)
        else:
            spans.append((block, block + 1))
    return tuple(Span(start, end) for start, end in spans)
