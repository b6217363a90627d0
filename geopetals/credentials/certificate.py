"""The membership certificate: what a peer got for its join token, bound to its peer id.

It is no secret. Whoever shows it must also be the peer that it names, which libp2p proves.
"""

from dataclasses import dataclass
from enum import StrEnum

from geopetals.credentials.envelope import Fields, seal, unseal
from geopetals.credentials.keys import SigningKey
from geopetals.credentials.peer_ids import pack_peer, unpack_peer
from geopetals.credentials.refusal import Refusal, refused
from geopetals.credentials.trust import TOKEN_ID_BYTES, Trust, check_time

MAX_CERTIFICATE_BYTES = 512
_KIND = "membership certificate"
_MAX_PEER_BYTES = 64


class Role(StrEnum):
    """What a join token's bearer may do."""

    SERVER = "server"
    CLIENT = "client"
    ADMIN = "admin"
    RELAY = "relay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Times are Unix times in seconds; `token_id` is the join token's, in hexadecimal."""

    swarm: str
    role: Role
    token_id: str
    peer_id: str
    issued_at: float
    expires_at: float

    def sign(self, key: SigningKey) -> bytes:
        body = {
            "s": self.swarm,
            "r": self.role.value,
            "i": bytes.fromhex(self.token_id),
            "p": pack_peer(self.peer_id),
            "t": int(self.issued_at),
            "x": int(self.expires_at),
        }
        return seal(_KIND, body, [key])

    @classmethod
    def verify(cls, data: bytes, trust: Trust, *, now: float, peer_id: str) -> "Certificate":
        """The certificate that `peer_id` shows. Raises NotAdmitted."""
        fields, _ = unseal(_KIND, data, trust.by_id, limit=MAX_CERTIFICATE_BYTES)
        certificate = cls(
            swarm=fields.text("s"),
            role=read_role(fields, "r"),
            token_id=fields.data("i", least=TOKEN_ID_BYTES, most=TOKEN_ID_BYTES).hex(),
            peer_id=unpack_peer(fields.data("p", most=_MAX_PEER_BYTES)),
            issued_at=float(fields.count("t")),
            expires_at=float(fields.count("x")),
        )
        if certificate.swarm != trust.swarm:
            raise refused(Refusal.FOREIGN_SWARM, f"the {_KIND} is of another swarm.")
        if certificate.peer_id != peer_id:
            raise refused(Refusal.FOREIGN_PEER, f"the {_KIND} was given to another peer.")
        check_time(_KIND, now=now, expires_at=certificate.expires_at, issued_at=certificate.issued_at)
        trust.check_token(certificate.token_id, _KIND)
        return certificate


def read_role(fields: Fields, key: str) -> Role:
    try:
        return Role(fields.text(key))
    except ValueError:
        raise fields.wrong(key) from None
