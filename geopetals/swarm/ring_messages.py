"""GeoPETALS' extension of PETALS' inference sessions: what stands in the metadata of their messages.

    client ─► s1 ─► s2 ─► … ─► sn ─► client        hidden states, pushed
    client ◄─► each of them                        control: opening, heartbeats, errors, what is not pushed

The client opens a PETALS session on every server; its first message has an Opening under one key, which stock servers
ignore. A server that knows it answers with its version under the same key, and from then on reads Steps, which are
numbered and name their position. It sends Beats, and says what became of its link to the next server. Whoever has not
sent an Opening gets PETALS' protocol and nothing else.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from geopetals.swarm.wire import WireError, write_metadata

VERSION = 1
KEY = "geopetals"
PUSH_STREAM = "GeoPetals.push"
MAX_CHUNK_TOKENS, MAX_CHUNK_BYTES = 512, 2**20
_MAX_NUMBER = 2**40
_MAX_NAME = 200
_MAX_CREDENTIAL_BYTES = 4096
_MAX_TIMES = 8
_LEAST_BEAT_S, _MOST_BEAT_S = 0.1, 60.0


def read_credential(metadata: dict[str, Any]) -> bytes:
    """What a client shows: a ticket or, for passes without a cache, its membership certificate. Raises WireError."""
    raw = metadata.get(KEY)
    credential = raw.get("credential", b"") if isinstance(raw, dict) else b""
    if not isinstance(credential, bytes) or len(credential) > _MAX_CREDENTIAL_BYTES:
        raise WireError(f"a credential has at most {_MAX_CREDENTIAL_BYTES} bytes")
    return credential


def credential_shown(credential: bytes) -> dict[str, Any]:
    """Metadata of a pass, or of a message that shows a newer ticket in the middle of a session."""
    return {KEY: {"credential": credential}}


class Want(IntEnum):
    """Which of a step's positions the client needs."""

    NOTHING = 0
    LAST = 1
    ALL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class NextHop:
    """The session, on another server, that goes on with this one's output."""

    peer_id: str
    session_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a client asks for when it opens a session on one server of a chain.

    `heartbeat_s`: how often the server shows that it is there. `is_last`: its output goes to the client, as the steps
    want it. `next_hop`: where it goes otherwise; None, or a link that fails: to the client, who relays it. `previous`:
    the peer id of the one server that may push steps. `trace`: steps tell how long they took where. `credential`: the
    ticket, where the swarm asks for one. `recovery`: the session had this part of its chain on another server,
    and waits for cache ahead of those that have not begun.
    """

    heartbeat_s: float
    is_last: bool
    next_hop: NextHop | None = None
    previous: str | None = None
    trace: bool = False
    credential: bytes = b""
    recovery: bool = False

    def to_dict(self) -> dict[str, Any]:
        following = None if self.next_hop is None else [self.next_hop.peer_id, self.next_hop.session_id]
        return {
            "version": VERSION,
            "heartbeat": self.heartbeat_s,
            "last": self.is_last,
            "next": following,
            "previous": self.previous,
            "trace": self.trace,
            "credential": self.credential,
            "recovery": self.recovery,
        }

    @classmethod
    def read(cls, metadata: dict[str, Any]) -> "Opening | None":
        """None where the client speaks PETALS alone. Raises WireError."""
        raw = metadata.get(KEY)
        if raw is None:
            return None
        if not isinstance(raw, dict) or not isinstance(raw.get("version"), int):
            raise WireError(f"{KEY} must be a map with a version")
        beat, following, previous = raw.get("heartbeat"), raw.get("next"), raw.get("previous")
        if not isinstance(beat, int | float) or not _LEAST_BEAT_S <= beat <= _MOST_BEAT_S:
            raise WireError(f"heartbeats come every {_LEAST_BEAT_S} to {_MOST_BEAT_S:.0f} seconds")
        if previous is not None and not _is_name(previous):
            raise WireError("the previous server must be a peer id")
        if following is not None and not (
            isinstance(following, list | tuple) and len(following) == 2 and all(map(_is_name, following))
        ):
            raise WireError("the next server must be a peer id and a session id")
        return cls(
            heartbeat_s=float(beat),
            is_last=raw.get("last") is True,
            next_hop=None if following is None else NextHop(peer_id=following[0], session_id=following[1]),
            previous=previous,
            trace=raw.get("trace") is True,
            credential=read_credential(metadata),
            recovery=raw.get("recovery") is True,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """Says of some tokens which step of the session they are and where they stand.

    `number` counts from 0 in every chain, so that a step that comes twice is ignored and a gap is an error. `position`
    is that of the first token. `relay`: the output goes to the client whatever links there are. `trace`: seconds
    behind other steps, computing, and checking, handing over and packing, of each server so far.
    """

    number: int
    position: int
    want: Want
    relay: bool = False
    trace: tuple[tuple[float, ...], ...] = ()

    def to_bytes(self) -> bytes:
        trace = [list(times) for times in self.trace]  # lists are plain msgpack, tuples an extension of hivemind's
        return write_metadata({"step": [self.number, self.position, int(self.want), self.relay, trace]})

    @classmethod
    def read(cls, metadata: dict[str, Any]) -> "Step":
        raw = metadata.get("step")
        if not isinstance(raw, list | tuple) or len(raw) != 5:
            raise WireError("a step must say its number, position and what is wanted of it")
        number, position, want, relay, trace = raw
        if type(number) is not int or type(position) is not int:
            raise WireError("a step's number and position must be integers")
        if not (0 <= number < _MAX_NUMBER and 0 <= position < _MAX_NUMBER):
            raise WireError("a step's number and position must not be negative")
        if type(want) is not int or want not in (0, 1, 2):
            raise WireError("a step asks for something unknown")
        if not _are_times(trace):
            raise WireError("a step's trace must be seconds, of each server")
        return cls(number, position, Want(want), relay is True, tuple(map(tuple, trace)))


@dataclass(frozen=True, slots=True)
class Beat:
    """A server's sign of life: how many steps it has received, computed and handed on."""

    received: int = 0
    computed: int = 0
    handed_on: int = 0

    def to_bytes(self) -> bytes:
        return write_metadata({"beat": [self.received, self.computed, self.handed_on]})

    @classmethod
    def read(cls, metadata: dict[str, Any]) -> "Beat | None":
        raw = metadata.get("beat")
        if not isinstance(raw, list | tuple) or len(raw) != 3 or not all(type(count) is int for count in raw):
            return None
        return cls(*raw)


class Link(IntEnum):
    """What became of a server's link to the next one. REFUSED: there never was one, outputs are relayed."""

    UP = 0
    REFUSED = 1
    LOST = 2


def link_report(link: Link, why: str) -> bytes:
    return write_metadata({"link": [int(link), why]})


def read_link(metadata: dict[str, Any]) -> tuple[Link, str] | None:
    raw = metadata.get("link")
    if not isinstance(raw, list | tuple) or len(raw) != 2 or raw[0] not in (0, 1, 2) or not isinstance(raw[1], str):
        return None
    return Link(raw[0]), raw[1][:_MAX_NAME]


def hello(session_id: str) -> bytes:
    """The first message of a push stream: whose steps follow."""
    return write_metadata({"session_id": session_id})


def read_hello(metadata: dict[str, Any]) -> str:
    session_id = metadata.get("session_id")
    if not isinstance(session_id, str) or not _is_name(session_id):
        raise WireError("a push stream must name its session first")
    return session_id


def version_of(metadata: dict[str, Any]) -> int:
    """Of a peer that has answered an opening; 0 is stock PETALS."""
    raw = metadata.get(KEY)
    version = raw.get("version") if isinstance(raw, dict) else None
    return version if isinstance(version, int) and version > 0 else 0


def chunk_tokens(batch: int, hidden_size: int, itemsize: int) -> int:
    """How many positions of a prompt go in one message: the next server begins while this one goes on."""
    return max(1, min(MAX_CHUNK_TOKENS, MAX_CHUNK_BYTES // (batch * hidden_size * itemsize)))


def _are_times(trace: Any) -> bool:
    return (
        isinstance(trace, list | tuple)
        and len(trace) <= 1000
        and all(isinstance(times, list | tuple) and len(times) <= _MAX_TIMES for times in trace)
        and all(type(seconds) is float for times in trace for seconds in times)
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME
