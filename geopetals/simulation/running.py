"""A session while it is in the swarm."""

from dataclasses import dataclass

from geopetals.plan import Chain, Reservation


@dataclass(slots=True, eq=False)
class Running:
    """From arrival to its end; after the loss of a server it begins again with a longer prompt and fewer tokens."""

    number: int
    client: int
    prompt: int
    """Tokens to prefill; 0: the workload's."""
    output: int
    """Tokens still to come."""
    slots: int
    """Caches that it holds for each block."""
    arrival_s: float
    attempted_s: float
    """When it began to look for a chain: at its arrival, or at the loss of a server."""
    version: int = 0
    """Events of an earlier version are void."""
    replays: bool = False
    """It has run before, on a chain that lost a server."""
    reservation: Reservation | None = None
    servers: frozenset[int] = frozenset()
    """Of the chain."""
    start_s: float = 0.0
    """Promised."""
    started: bool = False
    held_since_s: float = 0.0
    attempt_first_s: float | None = None
    """First token since it began, or began again."""
    first_s: float | None = None
    """First token of the session."""
    last_s: float | None = None
    """The last token before a server was lost."""

    @property
    def chain(self) -> Chain:
        return self.booked.route.chain

    @property
    def booked(self) -> Reservation:
        assert self.reservation is not None, "a session that is admitted has a reservation"
        return self.reservation
