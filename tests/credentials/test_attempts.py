"""Everything that somebody may try with a credential that is not good for it, and the reason that they are told."""

from collections.abc import Callable
from pathlib import Path

import pytest

from geopetals.credentials.certificate import Certificate, Role
from geopetals.credentials.refusal import Refusal
from geopetals.credentials.ticket import Ticket, digest_of
from geopetals.credentials.trust import SKEW_S
from geopetals.errors import NotAdmitted
from tests.issuing import OTHER_IDENTITY, SWARM, Issuer, Member, changed, flipped, new_peer, under_key_of


class Scene:
    """A swarm, a member of it, and the same of a foreign swarm."""

    def __init__(self, folder: Path) -> None:
        self.issuer = Issuer(folder / "own")
        self.member = self.issuer.member()
        self.foreign = Issuer(folder / "foreign", swarm="other").member(peer_id=self.member.peer_id)
        self.twin = Issuer(folder / "twin").member(peer_id=self.member.peer_id)
        self.trust = self.issuer.trust_source()

    @property
    def key_id(self) -> bytes:
        return self.trust.current.keys[0].id

    def revoke(self) -> None:
        self.issuer.authority.revoke(self.member.token_id)
        self.trust.offer(self.issuer.authority.signed_trust())

    def retire(self) -> None:
        self.issuer.authority.rotate()
        self.trust.offer(self.issuer.authority.signed_trust())
        self.issuer.authority.retire()
        self.trust.offer(self.issuer.authority.signed_trust())

    def let_pass(self, seconds: float) -> None:
        self.issuer.clock.now += seconds


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def later(scene: Scene, data: bytes, what: Callable[[Scene], None]) -> bytes:
    """The credential as it was before something happened."""
    what(scene)
    return data


TICKETS: dict[str, tuple[Callable[[Scene], bytes], Refusal]] = {
    "none": (lambda scene: b"", Refusal.MISSING),
    "noise": (lambda scene: b"\x92\xa1", Refusal.MALFORMED),
    "a number": (lambda scene: b"\x01", Refusal.MALFORMED),
    "huge": (lambda scene: b"\x00" * 5000, Refusal.MALFORMED),
    "cut short": (lambda scene: scene.member.signed_ticket()[:-1], Refusal.MALFORMED),
    "another byte": (lambda scene: flipped(scene.member.signed_ticket(), [-1]), Refusal.FORGED),
    "more tokens": (lambda scene: changed(scene.member.signed_ticket(), l=10**6), Refusal.FORGED),
    "a later end": (lambda scene: changed(scene.member.signed_ticket(), x=2**40), Refusal.FORGED),
    "a certificate": (lambda scene: scene.member.signed, Refusal.FORGED),
    "unsigned": (lambda scene: changed(scene.member.signed_ticket())[:-90], Refusal.MALFORMED),
    "another's key": (lambda scene: scene.twin.signed_ticket(), Refusal.UNKNOWN_KEY),
    "another's key by our name": (
        lambda scene: under_key_of(scene.twin.signed_ticket(), scene.key_id),
        Refusal.FORGED,
    ),
    "a retired key": (
        lambda scene: later(scene, scene.member.signed_ticket(), Scene.retire),
        Refusal.UNKNOWN_KEY,
    ),
    "of another swarm": (lambda scene: scene.foreign.signed_ticket(), Refusal.UNKNOWN_KEY),
    "for another swarm": (lambda scene: scene.member.signed_ticket(swarm="other"), Refusal.FOREIGN_SWARM),
    "for another revision": (
        lambda scene: scene.member.signed_ticket(model_digest=digest_of(OTHER_IDENTITY)),
        Refusal.FOREIGN_MODEL,
    ),
    "of another peer": (lambda scene: scene.member.signed_ticket(client_peer_id=new_peer()), Refusal.FOREIGN_PEER),
    "expired": (
        lambda scene: scene.member.signed_ticket(expires_at=scene.issuer.clock.now - SKEW_S - 1),
        Refusal.EXPIRED,
    ),
    "revoked": (lambda scene: later(scene, scene.member.signed_ticket(), Scene.revoke), Refusal.REVOKED),
    "another version": (lambda scene: scene.member.signed_ticket(version=2), Refusal.MALFORMED),
}


@pytest.mark.parametrize(("make", "refusal"), TICKETS.values(), ids=TICKETS.keys())
def test_a_ticket_that_is_not_good(scene: Scene, make: Callable[[Scene], bytes], refusal: Refusal) -> None:
    data = make(scene)
    with pytest.raises(NotAdmitted) as caught:
        Ticket.verify(
            data,
            scene.trust.current,
            now=scene.issuer.clock.now,
            peer_id=scene.member.peer_id,
            swarm=SWARM,
            model_digest=digest_of(scene.issuer.identity),
        )
    assert caught.value.reason == refusal
    assert len(str(caught.value)) > 10


CERTIFICATES: dict[str, tuple[Callable[[Scene], bytes], Refusal]] = {
    "none": (lambda scene: b"", Refusal.MISSING),
    "noise": (lambda scene: b"\xc1", Refusal.MALFORMED),
    "another role": (lambda scene: changed(scene.member.signed, r="server"), Refusal.FORGED),
    "a role that there is not": (
        lambda scene: scene.issuer.authority.sign(_with_role(scene.member)),
        Refusal.MALFORMED,
    ),
    "another peer by force": (lambda scene: changed(scene.member.signed, p=b"\x00" * 38), Refusal.FORGED),
    "a ticket": (lambda scene: scene.member.signed_ticket(), Refusal.FORGED),
    "of another peer": (lambda scene: scene.issuer.member().signed, Refusal.FOREIGN_PEER),
    "of another swarm": (lambda scene: scene.foreign.signed, Refusal.UNKNOWN_KEY),
    "for another swarm": (
        lambda scene: scene.issuer.authority.sign(_of_swarm(scene.member.certificate, "other")),
        Refusal.FOREIGN_SWARM,
    ),
    "expired": (
        lambda scene: later(scene, scene.member.signed, lambda scene: scene.let_pass(40 * 86400)),
        Refusal.EXPIRED,
    ),
    "of tomorrow": (
        lambda scene: later(scene, scene.member.signed, lambda scene: scene.let_pass(-86400)),
        Refusal.NOT_YET,
    ),
    "revoked": (lambda scene: later(scene, scene.member.signed, Scene.revoke), Refusal.REVOKED),
    "a retired key": (lambda scene: later(scene, scene.member.signed, Scene.retire), Refusal.UNKNOWN_KEY),
}


def _of_swarm(certificate: Certificate, swarm: str) -> Certificate:
    fields = {name: getattr(certificate, name) for name in Certificate.__dataclass_fields__}
    return Certificate(**{**fields, "swarm": swarm})


def _with_role(member: Member) -> Certificate:
    class King:
        value = "king"

    fields = {name: getattr(member.certificate, name) for name in Certificate.__dataclass_fields__}
    return Certificate(**{**fields, "role": King})


@pytest.mark.parametrize(("make", "refusal"), CERTIFICATES.values(), ids=CERTIFICATES.keys())
def test_a_certificate_that_is_not_good(scene: Scene, make: Callable[[Scene], bytes], refusal: Refusal) -> None:
    data = make(scene)
    with pytest.raises(NotAdmitted) as caught:
        Certificate.verify(data, scene.trust.current, now=scene.issuer.clock.now, peer_id=scene.member.peer_id)
    assert caught.value.reason == refusal


TOKENS: dict[str, tuple[Callable[[Scene], str], Refusal]] = {
    "none": (lambda scene: "", Refusal.MISSING),
    "noise": (lambda scene: "let me in", Refusal.MALFORMED),
    "of version 1": (lambda scene: "gp1" + scene.issuer.token().credential[3:], Refusal.MALFORMED),
    "cut short": (lambda scene: scene.issuer.token().credential[:-1], Refusal.MALFORMED),
    "another's": (lambda scene: scene.foreign.issuer.token().credential, Refusal.UNKNOWN_KEY),
    "another's of our name": (lambda scene: scene.twin.issuer.token().credential, Refusal.UNKNOWN_KEY),
    "expired": (
        lambda scene: later_token(scene, lambda scene: scene.let_pass(40 * 86400)),
        Refusal.EXPIRED,
    ),
    "revoked": (lambda scene: later_token(scene, revoke_all), Refusal.REVOKED),
    "a retired key": (lambda scene: later_token(scene, Scene.retire), Refusal.UNKNOWN_KEY),
    "made with a stolen key, of no id that was given out": (lambda scene: unknown_token(scene), Refusal.FORGED),
}


def later_token(scene: Scene, what: Callable[[Scene], None]) -> str:
    pasted = scene.issuer.token().credential
    what(scene)
    return pasted


def revoke_all(scene: Scene) -> None:
    for entry in scene.issuer.authority.tokens():
        scene.issuer.authority.revoke(entry.id)


def unknown_token(scene: Scene) -> str:
    """By the same keys, from a ledger that has been restored."""
    authority = scene.issuer.authority
    before = authority._ledger
    pasted = scene.issuer.token().credential
    authority._change(lambda change: change.update(tokens=before.tokens))
    return pasted


@pytest.mark.parametrize(("make", "refusal"), TOKENS.values(), ids=TOKENS.keys())
def test_a_join_token_that_is_not_good(scene: Scene, make: Callable[[Scene], str], refusal: Refusal) -> None:
    pasted = make(scene)
    with pytest.raises(NotAdmitted) as caught:
        scene.issuer.authority.admit(pasted, scene.member.peer_id)
    assert caught.value.reason == refusal


def test_what_is_good_is_let_in(scene: Scene) -> None:
    certificate = scene.issuer.authority.admit(scene.issuer.token(Role.SERVER).credential, scene.member.peer_id)
    assert (certificate.role, certificate.peer_id) == (Role.SERVER, scene.member.peer_id)
    ticket = scene.member.ticket()
    found = Ticket.verify(
        scene.member.signed_ticket(),
        scene.trust.current,
        now=ticket.expires_at + SKEW_S,
        peer_id=scene.member.peer_id,
        swarm=SWARM,
        model_digest=digest_of(scene.issuer.identity),
    )
    assert found == ticket
    assert found.key_id == scene.key_id
