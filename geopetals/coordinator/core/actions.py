"""What the core wants done. Whoever carries actions out turns them into messages and tickets, in the order given."""

from dataclasses import dataclass
from typing import Any

from geopetals.coordinator.codec import Message
from geopetals.coordinator.messages import ChainHop, Predicted, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign(Message):
    """The server is to drain for at most drain_s and to hold the span then; None: nothing."""

    peer: str
    epoch: int
    span: Span | None
    reason: str
    drain_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted(Message):
    """The session has its cache from now on. Also the answer to one that was extended, or asked for once more."""

    session_id: str
    client: str
    chain: tuple[ChainHop, ...]
    predicted: Predicted
    batch: int
    max_tokens: int
    """Of each sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(Message):
    """The session waits; position 0 is the next. Given again whenever the prediction has changed noticeably."""

    session_id: str
    client: str
    position: int
    start_in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Message):
    """The session is not admitted, or not extended (it then goes on as it was).

    `is_incomplete`: blocks have no server, so that there is no room to wait for.
    """

    session_id: str
    client: str
    why: str
    retry_after_s: float
    is_incomplete: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEnded(Message):
    """A session that had been admitted is given up by the coordinator: its lease ran out, or it stood still."""

    session_id: str
    client: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained(Message):
    """An entry of the history. `predicted` and `replaced` are JSON texts: {name: number} and {server: span}."""

    number: int
    at_s: float
    what: str
    why: str
    predicted: str = "{}"
    replaced: str = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLinks(Message):
    """The member is to measure round trips to these servers."""

    peer: str
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MakePlan(Message):
    """Only if Settings.plan_inline is False: run `make_plan(core.plan_job(number))` and give its event PlanMade."""

    number: int


Action = Assign | Admitted | Queued | Refused | SessionEnded | Explained | ProbeLinks | MakePlan


def action_to_dict(action: Action) -> dict[str, Any]:
    """As it stands in the log."""
    return {"kind": type(action).__name__, **action.to_dict()}
