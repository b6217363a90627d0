"""Expected failures. Each message is one sentence that says what is wrong and what to do next.

Commands print the message without a traceback and leave with `exit_code`: 2 when the user has to change something,
1 when the swarm failed while it was doing what it was asked to do.
"""


class GeoPetalsError(Exception):
    """Base of every expected failure."""

    exit_code = 2


class StackError(GeoPetalsError):
    """petals, hivemind or another package is absent or of a version that is known not to work."""


class CheckpointError(GeoPetalsError):
    """The model's files cannot be found, read or split."""


class BlocksError(GeoPetalsError):
    """A span of blocks is malformed or lies outside the model."""


class MemoryShortage(GeoPetalsError):
    """The blocks or the attention cache asked for do not fit in the memory allowed."""


class TokenError(GeoPetalsError):
    """A join token is malformed, truncated or of an unknown version."""


class SwarmMismatch(GeoPetalsError):
    """The swarm serves another model, or another revision of it."""


class NetworkError(GeoPetalsError):
    """An address cannot be bound, or a swarm cannot be reached."""


class UnsupportedInput(GeoPetalsError):
    """A request that the library refuses because it would not be answered correctly."""


class SwarmFailure(GeoPetalsError):
    """The swarm stopped doing what it was asked to do."""

    exit_code = 1


class NoChain(SwarmFailure):
    """Some blocks have no server: no chain covers the model."""


class ServerGone(SwarmFailure):
    """A block server does not answer any more."""


class ServerBroken(SwarmFailure):
    """A block server answers what cannot be right: another shape, or values that are no numbers."""


class ServerFull(SwarmFailure):
    """A block server has no attention cache left for the session, or takes no more of this client's requests.

    `free_in_s`: seconds until it expects to have room, if it knows.
    """

    def __init__(self, text: str, *, free_in_s: float | None = None) -> None:
        super().__init__(text)
        self.free_in_s = free_in_s


class ServerMoving(ServerFull):
    """A block server gives up its blocks for others: the session can go on elsewhere at once, and it is no failure."""


class ServerRefused(SwarmFailure):
    """A block server answered that the request itself is wrong."""


class InputRefused(ServerRefused):
    """A block server answered that the server before it sent what cannot be computed on."""


class NotAdmitted(ServerRefused):
    """A credential is absent, wrong, expired, revoked or somebody else's; the text says which.

    `reason`: the same in one word, as geopetals/credentials/refusal.py has them.
    """

    exit_code = 2

    def __init__(self, text: str, *, reason: str = "refused") -> None:
        super().__init__(text)
        self.reason = reason

    def __repr__(self) -> str:
        """What hivemind sends to the caller of a unary method."""
        return f"NotAdmitted({self.reason}): {self}"


class ControlLost(SwarmFailure):
    """The other end of a control channel does not answer any more."""


class Busy(SwarmFailure):
    """All is taken and the queue is full. `retry_after_s`: seconds after which there may be room, if that is known."""

    def __init__(self, text: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s
