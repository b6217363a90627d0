"""What the core is told. Each has an instant beside it, see Core.apply; times in seconds, sizes in bytes or tokens.

Members are named by their peer ids. Whoever turns messages into events has checked that they come from those members;
that what they say makes sense is checked by the core where it matters.
"""

from dataclasses import dataclass
from typing import Any

from geopetals.coordinator.codec import Message, MessageError
from geopetals.coordinator.core.plans import Plans
from geopetals.coordinator.messages import ChainHop, LinkSample, Measured, Open, Register, Report


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRegistered(Message):
    """A server is there, for the first time or again."""

    peer: str
    register: Register


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReported(Message):
    """What a server that has registered says of itself, its links included."""

    peer: str
    report: Report


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLost(Message):
    """Its channel is gone. Nothing is moved for as long as the settings' grace."""

    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLeft(Message):
    """It says goodbye, or was thrown out: no grace."""

    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksMeasured(Message):
    """Round trips from a server or a client to servers."""

    peer: str
    links: tuple[LinkSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSeen(Message):
    """A client's channel is there, for the first time or again."""

    client: str
    links: tuple[LinkSample, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLost(Message):
    """A client's channel is gone. Its leases end after the settings' lease unless it is seen again."""

    client: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionAsked(Message):
    """A client wants a session; asking again for one that is admitted or waits gives the same answer.

    group: whose share of the swarm it counts on, and whose place in the queue it takes: the join token, since one token
    admits many clients. Empty: the client's own.
    """

    client: str
    open: Open
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionCancelled(Message):
    client: str
    session_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionResumed(Message):
    """A client that comes back has this session still: it holds cache, whatever is known of it here."""

    client: str
    session_id: str
    batch: int
    max_length: int
    chain: tuple[ChainHop, ...]
    tokens_used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionsHeld(Message):
    """All sessions that a client has of those that it asked for before an instant."""

    client: str
    sessions: tuple[str, ...]
    asked_before_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionExtended(Message):
    """A session asks for more tokens than it was admitted for."""

    client: str
    session_id: str
    max_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionClosed(Message):
    client: str
    session_id: str
    measured: Measured = Measured()  # noqa: RUF009 - immutable


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick(Message):
    """Time has passed. To be given at least every 0.5 s, and at Core.next_due_s()."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted(Message):
    """The coordinator is back after an outage of its own: nobody was away for longer than since now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplanAsked(Message):
    """Somebody wants a new plan now; it is adopted under the same rule as any other."""

    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanMade(Message):
    """The answer to the action MakePlan: what `make_plan(core.plan_job(number))` gave."""

    plans: Plans


Event = (
    ServerRegistered
    | ServerReported
    | ServerLost
    | ServerLeft
    | LinksMeasured
    | ClientSeen
    | ClientLost
    | SessionAsked
    | SessionCancelled
    | SessionResumed
    | SessionsHeld
    | SessionExtended
    | SessionClosed
    | Tick
    | Restarted
    | ReplanAsked
    | PlanMade
)
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in Event.__args__}


def event_to_dict(event: Event) -> dict[str, Any]:
    """As it stands in the log."""
    return {"kind": type(event).__name__, **event.to_dict()}


def event_from_dict(raw: object) -> Event:
    """Raises MessageError."""
    kind = _KINDS.get(raw.get("kind", "")) if isinstance(raw, dict) else None
    if kind is None:
        raise MessageError("this is no event of the coordinator's log")
    event: Event = kind.from_dict(raw)  # type: ignore[assignment]
    return event
