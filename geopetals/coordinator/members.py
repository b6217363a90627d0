"""Who is connected: a channel, a role, and how much one member may ask for."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from geopetals.coordinator.messages import Assign, Role
from geopetals.errors import Busy
from geopetals.swarm.control import ControlChannel

_RATE_PER_S = 100.0
_BURST = 400.0
_BYTES_PER_S, _BYTES_BURST = 64.0 * 1024, 4.0 * 2**20
"""Reports are of a few kilobytes; one frame may have a megabyte."""
_REGISTRATIONS_PER_S, _REGISTRATIONS_BURST = 0.2, 5.0
_SHUN_S = 600.0
_MAX_REMEMBERED = 4096


class Allowance:
    """So many calls, or bytes, a second on average. `now` in seconds of any clock."""

    def __init__(self, now: float, *, rate_per_s: float = _RATE_PER_S, burst: float = _BURST) -> None:
        self._rate_per_s, self._burst = rate_per_s, burst
        self._left, self._at = burst, now

    def take(self, now: float, cost: float = 1.0) -> None:
        """Raises Busy if there were too many."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate_per_s)
        self._at = now
        if self._left < cost:
            why = "too much is asked: wait a moment."
            raise Busy(why, retry_after_s=(cost - self._left) / self._rate_per_s)
        self._left -= cost


@dataclass(slots=True, eq=False)
class Member:
    """A peer that has said hello. `trust`: the signed list that it was last sent. Times are Unix times.

    `unfit`: how many of its calls the core could not take.
    """

    peer_id: str
    role: Role
    token_id: str
    expires_at: float
    channel: ControlChannel
    since: float
    allowance: Allowance
    traffic: Allowance
    unfit: int = 0
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
    _of_token: Counter[str] = field(default_factory=Counter)
    _registrations: dict[str, Allowance] = field(default_factory=dict)
    _shunned: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._by_peer)

    def get(self, peer_id: str) -> Member | None:
        return self._by_peer.get(peer_id)

    def put(self, member: Member) -> None:
        before = self._by_peer.get(member.peer_id)
        if before is not None:
            self.remove(before)
            before.channel.close()
        self._by_peer[member.peer_id] = member
        self._of_token[member.token_id] += 1

    def remove(self, member: Member) -> bool:
        """Whether it was still the one of its peer."""
        if self._by_peer.get(member.peer_id) is not member:
            return False
        del self._by_peer[member.peer_id]
        self._of_token[member.token_id] -= 1
        if not self._of_token[member.token_id]:
            del self._of_token[member.token_id]
        return True

    def count_of(self, token_id: str) -> int:
        """How many have joined with one join token."""
        return self._of_token[token_id]

    def take_registration(self, peer_id: str, now: float) -> None:
        """Registering costs much, over all channels of a peer. Raises Busy."""
        allowance = self._registrations.pop(peer_id, None)
        if allowance is None:
            allowance = Allowance(now, rate_per_s=_REGISTRATIONS_PER_S, burst=_REGISTRATIONS_BURST)
        self._registrations[peer_id] = allowance
        _forget_oldest(self._registrations)
        allowance.take(now)

    def shun(self, peer_id: str, now: float) -> None:
        """Let it wait before it may join again."""
        self._shunned.pop(peer_id, None)
        self._shunned[peer_id] = now + _SHUN_S
        _forget_oldest(self._shunned)

    def check_not_shunned(self, peer_id: str, now: float) -> None:
        """Raises Busy."""
        left_s = self._shunned.get(peer_id, now) - now
        if left_s > 0:
            raise Busy("the coordinator could not work with what this member said: try later.", retry_after_s=left_s)

    def where(self, test: Callable[[Member], bool]) -> list[Member]:
        return [member for member in self._by_peer.values() if test(member)]


def _forget_oldest(known: dict[str, Any]) -> None:
    while len(known) > _MAX_REMEMBERED:
        del known[next(iter(known))]


def new_allowances(now: float) -> tuple[Allowance, Allowance]:
    """A member's, of calls and of bytes."""
    return Allowance(now), Allowance(now, rate_per_s=_BYTES_PER_S, burst=_BYTES_BURST)
