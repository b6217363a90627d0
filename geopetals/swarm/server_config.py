"""What an operator decides of a block server, and what is told of one that answers."""

from dataclasses import dataclass
from typing import Any

from geopetals.join_token import JoinToken
from geopetals.swarm.emulation import DeviceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What an operator decides; None is decided by the server, or by the swarm's coordinator.

    `blocks` is the half-open span to serve, `count` how many blocks at most, wherever they are needed. `memory_bytes`
    limits weights and attention cache together. `kv_cache_tokens` is how many tokens every block can hold over all
    sessions. `emulate`, for benchmarks: steps take the time of that device, and its memory is the limit if no other is
    given. `nat`: whether the server stands behind NAT, "auto", "yes" or "no"; `relays` are addresses of relays it may
    use. `reprofile`: measure the device anew.
    """

    model: str
    revision: str | None = None
    token: JoinToken | None = None
    initial_peers: tuple[str, ...] = ()
    swarm: str | None = None
    blocks: tuple[int, int] | None = None
    count: int | None = None
    device: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    memory_bytes: int | None = None
    kv_cache_tokens: int | None = None
    host: str = "127.0.0.1"
    port: int = 0
    public_ip: str | None = None
    name: str | None = None
    identity: bytes | None = None
    threads: int | None = None
    emulate: DeviceSpec | None = None
    nat: str = "auto"
    relays: tuple[str, ...] = ()
    reprofile: bool = False

    @property
    def is_coordinated(self) -> bool:
        return self.token is not None and self.token.coordinator is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyServer:
    """A server that answers: what it holds, and how to join its swarm if it has no coordinator. Sizes in bytes."""

    peer_id: str
    p2pd_pid: int
    start: int
    end: int
    num_blocks: int
    weights_bytes: int
    kv_bytes: int
    process_bytes: int
    token: str
    emulated: dict[str, Any] | None = None
