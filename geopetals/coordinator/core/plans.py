"""What a plan comes to: who is to hold what, and what sessions may expect of it."""

from dataclasses import dataclass

from geopetals.coordinator.codec import Message
from geopetals.coordinator.messages import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout(Message):
    """Who holds what, and the mean time of a session then; None: a session has no room, or a block no server."""

    spans: dict[str, Span]
    session_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans(Message):
    """What could be done: a new plan, or to stay and give only idle servers blocks."""

    number: int
    sessions: int
    """At once, for which both are judged."""
    new: Layout | None
    """None: there is none, `failed` says why."""
    stay: Layout
    repair: Layout | None = None
    """With few moves, where to stay would leave blocks without a server."""
    failed: str = ""
