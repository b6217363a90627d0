"""What placement and routing are asked: the swarm as arrays, in seconds and bytes, servers and clients by their index.

Symbols of the paper (arXiv 2512.21884), with L blocks, J servers (index j) and C clients (index c):

| paper    | here                 | shape  | meaning |
| -------- | -------------------- | ------ | ------- |
| L        | num_blocks           |        | transformer blocks of the model |
| s_m      | block_bytes          |        | memory of one block |
| s_c      | kv_bytes             |        | attention cache of one session in one block that it uses |
| l_out    | output_tokens        |        | tokens of a session: one by prefill, the others by decode steps |
| M_j      | memory_bytes         | (J,)   | memory for blocks and attention caches, after what the framework needs |
|          | max_blocks           | (J,)   | most blocks the server may hold (num_blocks where nothing limits it) |
| tau_j    | decode_block_s       | (J,)   | time per block of one decode step for one session |
| tauI_j   | prefill_block_s      | (J,)   | time per block of the workload's prompt |
| t_cj     | relay_decode_s       | (C, J) | round trip of one hidden state, per-hop overhead included |
| tI_cj    | relay_prefill_s      | (C, J) | the same for the prompt's hidden states |
| d_ij     | push                 |        | one-way delays where servers send to the next server; None if not known |
| lambda_c | demand_per_s         | (C,)   | sessions that arrive from each client |
|          | pinned               | J      | the span [start, end) of a server whose blocks must not move, or None |
| tau_j(b) | contention           |        | time per block of a decode step for b sessions at once; None = as for one |

An infinite delay is a link that does not exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geopetals.errors import BlocksError, MemoryShortage, UnsupportedInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OneWayDelays:
    """Delays of one message where servers push, per-hop overhead of the receiver included, in seconds."""

    from_client_s: Floats
    """(C, J): client c to the first server of its chain."""
    between_s: Floats
    """(J, J): server i to the next server j. The diagonal is not read."""
    to_client_s: Floats
    """(J, C): the last server of a chain to the client."""

    def __post_init__(self) -> None:
        clients, servers = np.shape(self.from_client_s)
        _freeze_floats(self, "from_client_s", (clients, servers), allow_inf=True)
        _freeze_floats(self, "between_s", (servers, servers), allow_inf=True)
        _freeze_floats(self, "to_client_s", (servers, clients), allow_inf=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PushDelays:
    """One-way delays of one token's hidden state and of the prompt's."""

    decode: OneWayDelays
    prefill: OneWayDelays

    def __post_init__(self) -> None:
        if self.decode.from_client_s.shape != self.prefill.from_client_s.shape:
            raise UnsupportedInput("push.decode and push.prefill differ in size: give both for the same machines.")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contention:
    """A decode step of b sessions at once takes floor_s + session_s * b per block: weights are read once for all."""

    floor_s: Floats
    """(J,): reading the weights of one block."""
    session_s: Floats
    """(J,): what each session adds per block."""

    def __post_init__(self) -> None:
        servers = np.size(self.floor_s)
        _freeze_floats(self, "floor_s", (servers,))
        _freeze_floats(self, "session_s", (servers,))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """One model, its servers, its clients and their demand. Arrays are copied and made read-only.

    Raises UnsupportedInput, BlocksError or MemoryShortage with the name of the field that is wrong.
    """

    num_blocks: int
    block_bytes: float
    kv_bytes: float
    output_tokens: int
    memory_bytes: Floats
    decode_block_s: Floats
    prefill_block_s: Floats
    relay_decode_s: Floats
    relay_prefill_s: Floats
    demand_per_s: Floats
    max_blocks: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Left empty, nothing limits the servers but their memory."""
    push: PushDelays | None = None
    pinned: tuple[tuple[int, int] | None, ...] = ()
    """Left empty, every server's blocks may move."""
    contention: Contention | None = None

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_bytes", "kv_bytes", "output_tokens"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise UnsupportedInput(f"{name} is {value}: give a positive number.")
        servers, clients = np.size(self.memory_bytes), np.size(self.demand_per_s)
        if not servers or not clients:
            raise UnsupportedInput(f"There are {servers} servers and {clients} clients: give at least one of each.")
        for name in ("memory_bytes", "decode_block_s", "prefill_block_s"):
            _freeze_floats(self, name, (servers,))
        _freeze_floats(self, "demand_per_s", (clients,))
        for name in ("relay_decode_s", "relay_prefill_s"):
            _freeze_floats(self, name, (clients, servers), allow_inf=True)
        self._freeze_limits()
        if self.push is not None and self.push.decode.from_client_s.shape != (clients, servers):
            raise UnsupportedInput(f"push is not for {clients} clients and {servers} servers: give delays for all.")
        if self.contention is not None and self.contention.floor_s.size != servers:
            raise UnsupportedInput(f"contention has {self.contention.floor_s.size} servers, not {servers}: give all.")

    @property
    def num_servers(self) -> int:
        """J."""
        return self.memory_bytes.size

    @property
    def num_clients(self) -> int:
        """C."""
        return self.demand_per_s.size

    def slots(self, held_blocks: NDArray[Any]) -> Ints:
        """Session-blocks whose caches fit beside the blocks that each server holds: floor((M - s_m m) / s_c), (J,)."""
        free = self.memory_bytes - self.block_bytes * held_blocks
        slots: Ints = np.maximum(np.floor(free / self.kv_bytes), 0).astype(np.int64)
        return slots

    def _freeze_limits(self) -> None:
        servers = self.num_servers
        limits = np.asarray(self.max_blocks)
        if not limits.size:
            limits = np.full(servers, self.num_blocks)
        if limits.shape != (servers,) or (limits < 0).any():
            raise UnsupportedInput(f"max_blocks has to be {servers} numbers of at least 0, one per server.")
        object.__setattr__(self, "max_blocks", _read_only(np.minimum(limits, self.num_blocks).astype(np.int64)))
        object.__setattr__(self, "pinned", tuple(self.pinned) or (None,) * servers)
        if len(self.pinned) != servers:
            raise UnsupportedInput(f"pinned has {len(self.pinned)} entries for {servers} servers: give one for each.")
        for server, span in enumerate(self.pinned):
            if span is not None:
                self._check_pin(server, *span)

    def _check_pin(self, server: int, start: int, end: int) -> None:
        if not 0 <= start < end <= self.num_blocks:
            raise BlocksError(
                f"pinned[{server}] is [{start}, {end}): choose a span inside the model's {self.num_blocks} blocks."
            )
        if end - start > self.max_blocks[server]:
            raise BlocksError(
                f"pinned[{server}] has {end - start} blocks and max_blocks[{server}] is {self.max_blocks[server]}: "
                "shorten the span or raise the limit."
            )
        if self.block_bytes * (end - start) > self.memory_bytes[server]:
            raise MemoryShortage(
                f"pinned[{server}] needs {self.block_bytes * (end - start):.0f} bytes and memory_bytes[{server}] is "
                f"{self.memory_bytes[server]:.0f}: shorten the span."
            )


def _freeze_floats(owner: object, name: str, shape: Sequence[int], *, allow_inf: bool = False) -> None:
    values = np.array(getattr(owner, name), dtype=np.float64)
    if values.shape != tuple(shape):
        raise UnsupportedInput(f"{name} has shape {values.shape}: give {tuple(shape)}.")
    if np.isnan(values).any() or (values < 0).any() or (not allow_inf and np.isinf(values).any()):
        raise UnsupportedInput(f"{name} has a negative or undefined value: give numbers of at least 0.")
    object.__setattr__(owner, name, _read_only(values))


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    values.flags.writeable = False
    return values
