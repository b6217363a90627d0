"""A session from the moment it is asked for until it is over."""

import math
from dataclasses import dataclass, field
from typing import Any

from geopetals.coordinator.messages import ChainHop, Predicted

UNKNOWN_S = 1e12
"""The start of a session for which there is no chain at present: later than any clock, Unix time included."""


@dataclass(slots=True, kw_only=True, eq=False)
class Session:
    """Queued, then admitted. Times on the core's clock."""

    session_id: str
    client: str
    number: int
    """In the order of asking."""
    batch: int
    max_length: int
    prompt: int
    output: int
    """Expected."""
    asked_s: float
    tag: float
    """Its place among those that wait: see FairOrder."""
    group: str = ""
    """Whose share of the swarm it counts on, besides its client's: see SessionAsked."""
    charged: float = 0.0
    """What it counts there."""
    admitted: bool = False
    chain: tuple[ChainHop, ...] = ()
    void: tuple[str, ...] = ()
    """Servers of the chain that it has no cache on any more: they moved or are gone."""
    start_s: float = UNKNOWN_S
    """Promised or extrapolated; when admitted, the real one."""
    end_s: float = 0.0
    """As predicted now."""
    service_s: float = 0.0
    """From start to end as predicted at the start, corrections included."""
    first_s: float = 0.0
    """From its start to its first token, uncorrected: beside the sessions that ran when its chain was chosen."""
    step_s: float = 0.0
    """Each further token, uncorrected."""
    predicted: Predicted | None = None
    first_start_s: float | None = None
    """The first prediction that was told."""
    told_start_s: float | None = None
    """The last one."""
    used: int = 0
    """Tokens of a sequence that its servers have processed."""
    progress_s: float = 0.0
    """When that was last seen to grow."""
    first_used: int = 0
    """The same when it was first reported,"""
    first_progress_s: float = 0.0
    """and when that was."""
    seen: bool = False
    """Whether any server has reported it."""
    bookings: list[int] = field(default_factory=list)
    """Numbers of its reservations: one, or one for each run of hops that are left."""

    def pages(self, page_tokens: int) -> int:
        """Of attention cache, in each block."""
        return math.ceil(self.batch * self.max_length / page_tokens)

    @property
    def payer(self) -> str:
        """On whose share it counts."""
        return self.group or self.client

    @property
    def key(self) -> tuple[float, int]:
        return self.tag, self.number

    def hops(self) -> list[ChainHop]:
        """Those on which it has cache."""
        return [hop for hop in self.chain if hop.peer_id not in self.void]

    def to_dict(self) -> dict[str, Any]:
        raw = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "bookings"}
        raw["chain"] = [list(hop) for hop in self.chain]
        raw["void"] = list(self.void)
        raw["predicted"] = None if self.predicted is None else self.predicted.to_dict()
        return raw

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Session":
        fields = dict(raw)
        fields["chain"] = tuple(ChainHop(*hop) for hop in raw["chain"])
        fields["void"] = tuple(raw["void"])
        fields["predicted"] = None if raw["predicted"] is None else Predicted.from_dict(raw["predicted"])
        return cls(**fields)


class FairOrder:
    """Start-time fair queueing: who has been given much of the swarm's cache lately waits behind who has not.

    The swarm's virtual time is the tag up to which all have begun: a small session that begins before its turn, in a
    gap, must not put back whoever asks next. A session's tag is that time, or where the client's session before it ends
    in virtual time, whichever is later; it lasts for its pages times its seconds. Peers with one join token are clients
    of their own here: friends often share one, which bounds how many of their sessions may wait.
    """

    def __init__(self) -> None:
        self.virtual = 0.0
        self.finish: dict[str, float] = {}

    def charge(self, session: Session, work: float) -> None:
        """One more session, which gets its tag and counts from now on."""
        session.tag, session.charged = max(self.virtual, self.finish.get(session.client, 0.0)), work
        self.finish[session.client] = session.tag + work

    def began(self, tag: float) -> None:
        if tag > self.virtual:
            self.virtual = tag
            if len(self.finish) > 1000:
                self.finish = {client: end for client, end in self.finish.items() if end > tag}

    def gave_up(self, session: Session) -> None:
        """A session that was counted has not begun. What it was charged is given back, whatever it has become since."""
        if session.client in self.finish:
            self.finish[session.client] = max(self.finish[session.client] - session.charged, 0.0)

    def to_dict(self) -> dict[str, Any]:
        return {"virtual": self.virtual, "finish": self.finish}

    def restore(self, raw: dict[str, Any]) -> None:
        self.virtual, self.finish = raw["virtual"], dict(raw["finish"])
