from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geopetals.credentials.certificate import Certificate
from geopetals.credentials.ticket import MAX_TICKET_BYTES, Ticket, digest_of
from geopetals.credentials.trust import Trust
from geopetals.errors import NotAdmitted
from tests.issuing import BLOCKS, IDENTITY, NOW, OTHER_IDENTITY, SWARM, Issuer, Member, new_peer

CHAIN = tuple((new_peer(), block, block + 1) for block in range(12))


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Member:
    return Issuer(tmp_path_factory.mktemp("tickets")).member()


def read(member: Member, data: bytes, trust: Trust | None = None) -> Ticket:
    return Ticket.verify(
        data,
        trust or member.issuer.authority.trust,
        now=NOW,
        peer_id=member.peer_id,
        swarm=SWARM,
        model_digest=digest_of(IDENTITY),
    )


@pytest.mark.parametrize("hops", range(0, len(CHAIN) + 1, 3))
def test_fits_into_600_bytes_whatever_the_chain(member: Member, hops: int) -> None:
    data = member.signed_ticket(chain=CHAIN[:hops], session_id="s" * 64, nonce=b"12345678")
    assert len(data) <= MAX_TICKET_BYTES
    ticket = read(member, data)
    assert ticket.chain == (CHAIN[:hops] if hops <= 6 else ())
    assert (ticket.blocks, ticket.session_id) == ((0, BLOCKS), "s" * 64)


def test_models_that_differ_in_their_weights_have_other_digests() -> None:
    assert digest_of(IDENTITY) != digest_of(OTHER_IDENTITY)
    assert len(digest_of(IDENTITY)) == 16


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=700))
def test_no_bytes_do_more_than_be_refused(member: Member, data: bytes) -> None:
    trust = member.issuer.authority.trust
    with pytest.raises(NotAdmitted):
        read(member, data, trust)
    with pytest.raises(NotAdmitted):
        Certificate.verify(data, trust, now=NOW, peer_id=member.peer_id)
    with pytest.raises(NotAdmitted):
        trust.read(data)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_bit_can_be_changed(member: Member, position: int, bit: int) -> None:
    data = bytearray(member.signed_ticket(chain=CHAIN[:2]))
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(NotAdmitted):
        read(member, bytes(data))


def test_hostile_bodies_are_refused_although_they_are_signed(member: Member, tmp_path: Path) -> None:
    """A coordinator that is broken must not break servers."""
    for change in (
        {"blocks": (3, 3)},
        {"blocks": (0, 2**20)},
        {"session_id": "a\x1b"},
        {"session_id": "s" * 65},
        {"max_length": -1},
        {"nonce": b"123456789"},
    ):
        with pytest.raises(NotAdmitted) as caught:
            read(member, member.signed_ticket(**change))
        assert caught.value.reason == "malformed"
