"""Who is there: servers and clients as the core knows them. Mutable, and owned by the core alone."""

from dataclasses import dataclass, field
from typing import Any

from geopetals.coordinator.messages import CacheUse, Register, Span


@dataclass(slots=True, kw_only=True, eq=False)
class Server:
    """Its place in the planning arrays is its place in the order of registration."""

    peer: str
    register: Register
    epoch: int = 0
    """Of the last assignment."""
    assigned: Span | None = None
    """What it holds, or is to hold once it is ready again."""
    assigned_at: float = 0.0
    moving: bool = False
    """The last assignment is not fulfilled yet."""
    serving: Span | None = None
    """What sessions may use now; None also while it moves or is away."""
    held: Span | None = None
    """What it said it has, whether or not it serves it."""
    cache: CacheUse | None = None
    foreign: int = 0
    """Block-tokens of sessions that hold cache without a booking: recoveries from other servers, stock clients."""
    reported: dict[str, int] = field(default_factory=dict)
    """Block-tokens by session, of the last report."""
    away_since: float | None = None
    """Its channel is gone since then."""
    failures: int = 0
    penalty_until: float = 0.0
    """It keeps what it holds until then: its last load failed."""
    load_s: float | None = None
    """What its last load took."""
    probed: float = 0.0
    heard_at: float = 0.0
    """When it registered or reported last."""

    @property
    def present(self) -> bool:
        return self.away_since is None

    def to_dict(self) -> dict[str, Any]:
        return {
            "register": self.register.to_dict(),
            "epoch": self.epoch,
            "assigned": None if self.assigned is None else list(self.assigned),
            "assigned_at": self.assigned_at,
            "moving": self.moving,
            "serving": None if self.serving is None else list(self.serving),
            "held": None if self.held is None else list(self.held),
            "cache": None if self.cache is None else self.cache.to_dict(),
            "foreign": self.foreign,
            "reported": self.reported,
            "away_since": self.away_since,
            "failures": self.failures,
            "penalty_until": self.penalty_until,
            "load_s": self.load_s,
            "probed": self.probed,
            "heard_at": self.heard_at,
        }

    @classmethod
    def from_dict(cls, peer: str, raw: dict[str, Any]) -> "Server":
        spans = {key: None if raw[key] is None else Span(*raw[key]) for key in ("assigned", "serving", "held")}
        read: dict[str, Any] = {
            **raw,
            **spans,
            "register": Register.from_dict(raw["register"]),
            "cache": None if raw["cache"] is None else CacheUse.from_dict(raw["cache"]),
            "reported": dict(raw["reported"]),
        }
        return cls(peer=peer, **read)


@dataclass(slots=True, kw_only=True, eq=False)
class Client:
    """One that has been seen, and not been away for longer than its lease."""

    peer: str
    away_since: float | None = None
    probed: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"away_since": self.away_since, "probed": self.probed}
