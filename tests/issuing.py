"""A swarm's credentials with a clock of the test's own, and what a cheat would make of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack

from geopetals.credentials.authority import Authority
from geopetals.credentials.certificate import Certificate, Role
from geopetals.credentials.keys import SigningKey
from geopetals.credentials.ledger import SwarmFacts
from geopetals.credentials.peer_ids import peer_of_key
from geopetals.credentials.ticket import Ticket, digest_of
from geopetals.credentials.trust import TrustSource
from geopetals.join_token import JoinToken
from geopetals.swarm.identity import ModelIdentity

NOW = 1_900_000_000.0
SWARM, BLOCKS = "tiny", 6
IDENTITY = ModelIdentity(model="tiny", config_hash="ab" * 32, revision=None, fingerprint="cd" * 32)
OTHER_IDENTITY = replace(IDENTITY, fingerprint="ef" * 32)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def new_peer() -> str:
    return peer_of_key(SigningKey.generate().public)


class Issuer:
    """A coordinator's authority, and the members that it lets in."""

    def __init__(
        self,
        folder: Path,
        *,
        swarm: str = SWARM,
        identity: ModelIdentity = IDENTITY,
        is_open: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.authority = Authority(folder, clock=self.clock)
        self.peer_id = new_peer()
        self.authority.describe_swarm(
            SwarmFacts(
                swarm=swarm,
                model=identity.model,
                identity=identity.to_dict(),
                coordinator_peer_id=self.peer_id,
                addresses=(f"/ip4/203.0.113.7/tcp/31330/p2p/{self.peer_id}",),
                open=is_open,
            )
        )
        self.swarm, self.identity = swarm, identity

    def token(self, role: Role = Role.CLIENT, **options: Any) -> JoinToken:
        return self.authority.create_token(role, **options)

    def member(self, role: Role = Role.CLIENT, peer_id: str | None = None, token: JoinToken | None = None) -> "Member":
        token = token or self.token(role)
        return Member(self, self.authority.admit(token.credential, peer_id or new_peer()))

    def trust_source(self) -> TrustSource:
        """What a member has heard of until now."""
        source = TrustSource(self.token().trust)
        source.offer(self.authority.signed_trust())
        return source


class Member:
    """A peer with a certificate of the issuer's."""

    def __init__(self, issuer: Issuer, certificate: Certificate) -> None:
        self.issuer, self.certificate = issuer, certificate
        self.peer_id, self.token_id = certificate.peer_id, certificate.token_id
        self.signed = issuer.authority.sign(certificate)

    def ticket(self, **change: Any) -> Ticket:
        fields: dict[str, Any] = {
            "swarm": self.issuer.swarm,
            "model_digest": digest_of(self.issuer.identity),
            "session_id": "session",
            "client_peer_id": self.peer_id,
            "blocks": (0, BLOCKS),
            "max_length": 16,
            "batch": 2,
            "expires_at": self.issuer.clock.now + 600,
            "token_id": self.token_id,
            **change,
        }
        return Ticket(**fields)

    def signed_ticket(self, **change: Any) -> bytes:
        return self.issuer.authority.sign(self.ticket(**change))


def opened(credential: bytes) -> tuple[dict[str, Any], list[Any]]:
    """A credential's body and signatures, as anybody can read them."""
    packed, signatures = msgpack.unpackb(credential)
    return msgpack.unpackb(packed), signatures


def changed(credential: bytes, **fields: Any) -> bytes:
    """The credential with another body under the old signatures."""
    body, signatures = opened(credential)
    data: bytes = msgpack.packb([msgpack.packb({**body, **fields}), signatures])
    return data


def under_key_of(credential: bytes, key_id: bytes) -> bytes:
    """The same, claimed to be signed with another key."""
    packed, signatures = msgpack.unpackb(credential)
    data: bytes = msgpack.packb([packed, [[key_id, signature] for _, signature in signatures]])
    return data


def flipped(data: bytes, positions: Sequence[int]) -> bytes:
    damaged = bytearray(data)
    for position in positions:
        damaged[position] ^= 1
    return bytes(damaged)
