"""The ticket: leave for one session's cache on any server of the swarm, checked by each of them offline.

It is bound to the client's peer id and therefore no secret. The chain in it is advice; recovery may go elsewhere.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from geopetals.credentials.envelope import Fields, seal, unseal
from geopetals.credentials.keys import SigningKey
from geopetals.credentials.peer_ids import pack_peer, unpack_peer
from geopetals.credentials.refusal import Refusal, refused
from geopetals.credentials.trust import TOKEN_ID_BYTES, Trust, check_time
from geopetals.swarm.identity import ModelIdentity

MAX_TICKET_BYTES = 600
DIGEST_BYTES = 16
VERSION = 1
_KIND = "ticket"
_MAX_SESSION_ID, _MAX_PEER_BYTES, _MAX_HOPS, _MAX_BLOCKS = 64, 64, 32, 2**16
_NONCE_BYTES = 8


class TicketKind(StrEnum):
    """SESSION: the one session that it names. STANDBY: sessions of any name, for times without a coordinator.

    Either way the sessions that are open with it at a time hold no more than its tokens on a server.
    """

    SESSION = "session"
    STANDBY = "standby"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """For `batch` sequences of `max_length` tokens through the half-open span `blocks`.

    `expires_at` (Unix time, seconds) is when it stops opening sessions, also in recovery; open ones go on. `chain`:
    (peer id, start, end) of each hop. `nonce` tells tickets apart that are equal otherwise.
    """

    swarm: str
    model_digest: bytes
    session_id: str
    client_peer_id: str
    blocks: tuple[int, int]
    max_length: int
    batch: int
    expires_at: float
    token_id: str
    kind: TicketKind = TicketKind.SESSION
    chain: tuple[tuple[str, int, int], ...] = ()
    nonce: bytes = b""
    key_id: bytes = field(default=b"", compare=False)
    version: int = VERSION

    def sign(self, key: SigningKey) -> bytes:
        """At most MAX_TICKET_BYTES: a chain that is too long for it is left out, being advice."""
        data = seal(_KIND, self._body(), [key])
        if len(data) > MAX_TICKET_BYTES and self.chain:
            return replace(self, chain=()).sign(key)
        if len(data) > MAX_TICKET_BYTES:
            raise ValueError(f"a ticket of {len(data)} bytes is over the limit of {MAX_TICKET_BYTES}")
        return data

    def _body(self) -> dict[str, Any]:
        return {
            "v": self.version,
            "k": self.kind.value,
            "s": self.swarm,
            "m": self.model_digest,
            "n": self.session_id,
            "c": pack_peer(self.client_peer_id),
            "b": list(self.blocks),
            "l": self.max_length,
            "q": self.batch,
            "x": int(self.expires_at),
            "i": bytes.fromhex(self.token_id),
            "h": [[pack_peer(peer_id), start, end] for peer_id, start, end in self.chain],
            "o": self.nonce,
        }

    @classmethod
    def verify(
        cls, data: bytes, trust: Trust, *, now: float, peer_id: str, swarm: str, model_digest: bytes
    ) -> "Ticket":
        """The ticket that `peer_id` shows to a server of `swarm`. Raises NotAdmitted."""
        fields, key_id = unseal(_KIND, data, trust.by_id, limit=MAX_TICKET_BYTES)
        ticket = cls._read(fields, key_id)
        if ticket.swarm != swarm or ticket.swarm != trust.swarm:
            raise refused(Refusal.FOREIGN_SWARM, "the ticket is for another swarm.")
        if ticket.model_digest != model_digest:
            raise refused(Refusal.FOREIGN_MODEL, "the ticket is for another model, or another revision of it.")
        if ticket.client_peer_id != peer_id:
            raise refused(Refusal.FOREIGN_PEER, "the ticket was given to another peer.")
        check_time(_KIND, now=now, expires_at=ticket.expires_at)
        trust.check_token(ticket.token_id, _KIND)
        return ticket

    @classmethod
    def _read(cls, fields: Fields, key_id: bytes) -> "Ticket":
        if fields.count("v") != VERSION:
            raise refused(Refusal.MALFORMED, "the ticket is of another version: update geopetals on this machine.")
        return cls(
            kind=_read_kind(fields),
            swarm=fields.text("s"),
            model_digest=fields.data("m", most=DIGEST_BYTES),
            session_id=fields.text("n", most=_MAX_SESSION_ID),
            client_peer_id=unpack_peer(fields.data("c", most=_MAX_PEER_BYTES)),
            blocks=_span(fields, fields.items("b", most=2)),
            max_length=fields.count("l"),
            batch=fields.count("q"),
            expires_at=float(fields.count("x")),
            token_id=fields.data("i", least=TOKEN_ID_BYTES, most=TOKEN_ID_BYTES).hex(),
            chain=tuple(_hop(fields, hop) for hop in fields.items("h", most=_MAX_HOPS)),
            nonce=fields.data("o", most=_NONCE_BYTES),
            key_id=key_id,
        )


def digest_of(identity: ModelIdentity) -> bytes:
    """Of the identity in the join token, which all members share: each knows its own copy of the model less or more."""
    canonical = json.dumps(identity.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).digest()[:DIGEST_BYTES]


def _read_kind(fields: Fields) -> TicketKind:
    try:
        return TicketKind(fields.text("k"))
    except ValueError:
        raise fields.wrong("k") from None


def _span(fields: Fields, value: Any) -> tuple[int, int]:
    if len(value) != 2 or not all(type(block) is int for block in value) or not 0 <= value[0] < value[1] <= _MAX_BLOCKS:
        raise fields.wrong("b")
    return value[0], value[1]


def _hop(fields: Fields, value: Any) -> tuple[str, int, int]:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], bytes):
        raise fields.wrong("h")
    if len(value[0]) > _MAX_PEER_BYTES:
        raise fields.wrong("h")
    return unpack_peer(value[0]), *_span(fields, value[1:])
