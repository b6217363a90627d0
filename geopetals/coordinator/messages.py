"""What members of a swarm and their coordinator say to each other: the bodies of the control channel's methods.

Times in seconds, sizes in bytes; `block_tokens` count one token of one sequence in one block. `from_dict` raises
MessageError (a ValueError) for whatever cannot have been sent by `to_dict`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from geopetals.coordinator.codec import Message, MessageError

VERSION = 1
OLDEST = 1
"""Of members that are understood: below VERSION when there is a next one, as swarms are upgraded member by member."""
REPORT_S = 2.0
MAX_SESSION_ID = 64
MAX_PEER_ID = 100
_MAX_BATCH, _MAX_TOKENS = 1024, 2**24

Role = Literal["server", "client", "admin", "relay"]
ServerState = Literal["joining", "loading", "ready", "draining", "failed"]


class Span(NamedTuple):
    """Blocks [start, end)."""

    start: int
    end: int


class LinkSample(NamedTuple):
    """How long a round trip to a peer takes from the member that says so, and whether it goes through a relay."""

    peer_id: str
    rtt_s: float
    relayed: bool


class RateSample(NamedTuple):
    """How many bytes a second came from a peer, in the large messages that it sent lately."""

    peer_id: str
    bytes_per_s: float


class ChainHop(NamedTuple):
    """Blocks [start, end) at one server."""

    peer_id: str
    start: int
    end: int


class DecodeSample(NamedTuple):
    """A decode step of `batch` sessions at `context` tokens."""

    batch: int
    context: int
    seconds_per_block: float


class PrefillSample(NamedTuple):
    """A prompt of `tokens`, alone."""

    tokens: int
    seconds_per_block: float


class SessionUse(NamedTuple):
    """A session that holds cache on a server: what is reserved for it, and how many tokens it has processed."""

    session_id: str
    block_tokens: int
    tokens_used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Message):
    """`hello`, the first call on every channel. `token`: the credential of the join token, or empty with a certificate
    from an earlier hello."""

    version: int
    role: Role
    token: str = ""
    certificate: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome(Message):
    """Answers `hello`. `trust`: signed keys and revocations. `standby`: a client's ticket for when no coordinator
    answers. `now`: the coordinator's Unix time."""

    certificate: bytes
    trust: bytes
    trust_version: int
    swarm: str
    model: str
    identity: dict[str, str | None]
    open: bool
    heartbeat_s: float
    now: float
    standby: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(Message):
    """What a server measured of itself, on real blocks. `kv_bytes_per_token` is one block's, `memory_bytes` what blocks
    and cache may take together, `overhead_s` a hop's software, `load_bytes_s` from disk to ready."""

    device: str
    dtype: str
    quantization: str | None
    block_bytes: int
    kv_bytes_per_token: int
    memory_bytes: int
    decode: tuple[DecodeSample, ...]
    prefill: tuple[PrefillSample, ...]
    overhead_s: float
    bandwidth_bytes_s: float | None = None
    load_bytes_s: float | None = None
    measured_at: float = 0.0
    version: int = VERSION

    def __post_init__(self) -> None:
        if not self.decode or not self.prefill:
            raise MessageError("a profile has at least one measurement of decode and one of prefill")
        if not self.block_bytes or not self.kv_bytes_per_token or not self.memory_bytes:
            raise MessageError("a profile's block_bytes, kv_bytes_per_token and memory_bytes are above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits(Message):
    """What the operator of a server allows. `pin`: exactly these blocks."""

    pin: Span | None = None
    max_blocks: int | None = None
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Register(Message):
    """`register`. `held`: the blocks that it has ready, `epoch`: of the assignment that put them there, else 0."""

    profile: Profile
    limits: Limits
    held: Span | None
    epoch: int
    name: str
    addresses: tuple[str, ...]
    relayed: bool
    wire: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered(Message):
    """Answers `register`. `span` None: nothing to hold for now; an `assign` may follow at any time."""

    epoch: int
    span: Span | None
    reason: str
    probe: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUse(Message):
    """A server's attention cache in block-tokens, and its sessions with and waiting for cache."""

    total: int
    free: int
    running: int
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Message):
    """`report`, every REPORT_S and on each change."""

    epoch: int
    state: ServerState
    span: Span | None
    error: str = ""
    cache: CacheUse
    sessions: tuple[SessionUse, ...] = ()
    links: tuple[LinkSample, ...] = ()
    rates: tuple[RateSample, ...] = ()
    load_s: float | None = None
    bytes_loaded: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported(Message):
    """Answers `report`. `known` False: register again. `trust` is there when its version is newer than last said."""

    trust_version: int
    trust: bytes | None = None
    probe: tuple[str, ...] = ()
    known: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign(Message):
    """`assign`, to a server: drain for at most `drain_s`, then hold this span."""

    epoch: int
    span: Span | None
    reason: str
    drain_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned(Message):
    """Answers `assign`."""

    accepted: bool
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted(Message):
    """What the planning core expects of a session. `tpot_s` is the mean after the first token."""

    ttft_s: float
    tpot_s: float
    end_to_end_s: float
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Open(Message):
    """`open`: a client asks for cache on a chain, `batch` sequences of at most `max_length` tokens.

    `output_tokens` None: the client does not know.
    """

    session_id: str
    batch: int
    max_length: int
    prompt_tokens: int
    output_tokens: int | None = None
    links: tuple[LinkSample, ...] = ()

    def __post_init__(self) -> None:
        check_session_id(self.session_id)
        if not 1 <= self.batch <= _MAX_BATCH or not 1 <= self.max_length <= _MAX_TOKENS:
            raise MessageError(f"a session has 1 to {_MAX_BATCH} sequences of 1 to {_MAX_TOKENS} tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Message):
    """Answers `open`. Admitted: `ticket`, `chain` and `predicted` are there; queued: a place and a time."""

    status: Literal["admitted", "queued"]
    ticket: bytes = b""
    chain: tuple[ChainHop, ...] = ()
    predicted: Predicted | None = None
    position: int = 0
    start_in_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted(Message):
    """`admitted`, to a client whose session waited."""

    session_id: str
    ticket: bytes
    chain: tuple[ChainHop, ...]
    predicted: Predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(Message):
    """`queue`, to a client: its place, 0 is next, and when its session is expected to start."""

    session_id: str
    position: int
    start_in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Message):
    """`refused`, to a client whose session waited, or was admitted and has lost its lease."""

    session_id: str
    why: str
    retry_after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Extend(Message):
    """`extend`: a session is going to be longer than it was asked for."""

    session_id: str
    max_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended(Message):
    """Answers `extend`: the ticket for the new length."""

    ticket: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Message):
    """What became of a session; None is what it did not get to. `tokens` that were generated."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    tokens: int = 0
    wait_s: float = 0.0
    end_to_end_s: float | None = None
    failovers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Close(Message):
    """`close`."""

    session_id: str
    measured: Measured = Measured()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSession(Message):
    """A session that goes on through the loss of a channel."""

    session_id: str
    ticket: bytes
    chain: tuple[ChainHop, ...]
    tokens_used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(Message):
    """`resume`, after `hello` on a new channel. Sessions that still wait are asked for once more by `open`.

    `held`: all sessions that the client has, in whatever state: others are over. None: it does not say.
    """

    sessions: tuple[RunningSession, ...]
    held: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Links(Message):
    """`links`: a client's round trips to servers."""

    links: tuple[LinkSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksTaken(Message):
    """Answers `links`: what is newer than the member knows. `probe`: servers to measure next."""

    trust_version: int
    trust: bytes | None = None
    standby: bytes = b""
    probe: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel(Message):
    """`cancel`: of a session that waits or has just been admitted."""

    session_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Message):
    """The answer to methods that have nothing to say."""


def check_shown(text: str, what: str, most: int) -> None:
    """What people may be shown in a terminal: no control characters, nor such as change how the rest is read."""
    if len(text) > most or not text.isprintable():
        raise MessageError(f"{what} has at most {most} printable characters")


def check_session_id(session_id: str) -> None:
    if not 0 < len(session_id) <= MAX_SESSION_ID or not session_id.isprintable():
        raise MessageError(f"a session id has 1 to {MAX_SESSION_ID} printable characters")
