"""Who is connected: a channel, a role, and how much one member may ask for."""

from collections.abc import Callable
from dataclasses import dataclass, field

from geopetals.coordinator.messages import Assign, Role
from geopetals.errors import Busy
from geopetals.swarm.control import ControlChannel

_RATE_PER_S = 100.0
_BURST = 400.0


class Allowance:
    """So many calls a second on average. `now` in seconds of any clock."""

    def __init__(self, now: float, *, rate_per_s: float = _RATE_PER_S, burst: float = _BURST) -> None:
        self._rate_per_s, self._burst = rate_per_s, burst
        self._left, self._at = burst, now

    def take(self, now: float) -> None:
        """Raises Busy if there were too many."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate_per_s)
        self._at = now
        if self._left < 1:
            why = f"too many calls: at most {self._rate_per_s:g} per second."
            raise Busy(why, retry_after_s=(1 - self._left) / self._rate_per_s)
        self._left -= 1


@dataclass(slots=True, eq=False)
class Member:
    """A peer that has said hello. `trust`: the signed list that it was last sent. Times are Unix times."""

    peer_id: str
    role: Role
    token_id: str
    expires_at: float
    channel: ControlChannel
    since: float
    allowance: Allowance
    trust: bytes = b""
    name: str = ""
    is_registered: bool = False
    probes: tuple[str, ...] = ()
    assigned: Assign | None = None
    assigned_at: float = 0.0

    def take_probes(self) -> tuple[str, ...]:
        probes, self.probes = self.probes, ()
        return probes


@dataclass(slots=True)
class Members:
    """All members that are connected, by peer id: a new channel takes the place of an older one."""

    _by_peer: dict[str, Member] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._by_peer)

    def get(self, peer_id: str) -> Member | None:
        return self._by_peer.get(peer_id)

    def put(self, member: Member) -> None:
        before = self._by_peer.get(member.peer_id)
        self._by_peer[member.peer_id] = member
        if before is not None:
            before.channel.close()

    def remove(self, member: Member) -> bool:
        """Whether it was still the one of its peer."""
        if self._by_peer.get(member.peer_id) is not member:
            return False
        del self._by_peer[member.peer_id]
        return True

    def where(self, test: Callable[[Member], bool]) -> list[Member]:
        return [member for member in self._by_peer.values() if test(member)]
