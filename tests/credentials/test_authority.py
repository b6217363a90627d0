import os
import stat
import threading
from pathlib import Path

import pytest

from geopetals.credentials.authority import CERTIFICATE_LIFE_S, TRUST_REISSUE_S, Authority
from geopetals.credentials.certificate import Certificate, Role
from geopetals.credentials.keys import SigningKey
from geopetals.credentials.ledger import LedgerFile, SwarmFacts
from geopetals.credentials.refusal import Refusal
from geopetals.credentials.trust import MAX_REVOKED, MAX_TRUST_BYTES, Trust, TrustSource
from geopetals.errors import Busy, NotAdmitted, TokenError
from geopetals.join_token import JoinToken
from tests.issuing import IDENTITY, NOW, Clock, Issuer, new_peer


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path / "state")


def test_only_the_owner_can_read_the_keys(issuer: Issuer, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    assert stat.S_IMODE((folder / "credentials.json").stat().st_mode) == 0o600


def test_the_ledger_holds_no_token_that_somebody_could_use(issuer: Issuer, tmp_path: Path) -> None:
    pasted = issuer.token().credential
    assert pasted not in (tmp_path / "state/credentials.json").read_text()


def test_nothing_that_is_shown_or_logged_contains_a_key_or_a_token(issuer: Issuer) -> None:
    token = issuer.token()
    ledger = issuer.authority._ledger
    shown = repr([token, ledger, ledger.keys, issuer.authority])
    assert ledger.keys[0].secret().hex() not in shown
    assert repr(ledger.keys[0].secret()) not in shown
    assert token.credential not in shown


def test_a_token_is_pasted_by_one_and_read_by_the_other(issuer: Issuer) -> None:
    token = issuer.token(Role.SERVER, life_s=3600)
    pasted = JoinToken.decode(f" {token.credential[:50]}\n{token.credential[50:]}", now=NOW)
    assert pasted == token
    assert pasted.credential == token.credential == pasted.encode()
    assert (pasted.role, pasted.expires_at, pasted.open) == (Role.SERVER, NOW + 3600, False)
    assert pasted.coordinator is not None
    assert pasted.coordinator.peer_id == issuer.peer_id
    assert pasted.peers == pasted.coordinator.addresses


def test_a_machine_with_many_addresses_and_relays_has_tokens_too(tmp_path: Path) -> None:
    def addresses(count: int) -> tuple[str, ...]:
        return tuple(f"/dns/{'a' * 60}.{number}.example/tcp/31330/p2p/{peer}" for number in range(count))

    peer, authority = new_peer(), Authority(tmp_path, clock=Clock())
    authority.describe_swarm(
        SwarmFacts(
            swarm="s" * 128,
            model="m" * 300,
            identity=IDENTITY.to_dict(),
            coordinator_peer_id=peer,
            addresses=addresses(30),
            relays=addresses(20),
        )
    )
    token = JoinToken.decode(authority.create_token(Role.CLIENT).credential, now=NOW)
    assert token.peers == addresses(4)
    assert token.relays == addresses(4)
    assert len(token.credential) < 4096  # what terminals take in one line


def test_every_change_of_a_character_of_a_token_is_noticed(issuer: Issuer) -> None:
    text = issuer.token().credential
    for position in range(0, len(text), 7):
        other = "2" if text[position] != "2" else "3"
        with pytest.raises(TokenError):
            JoinToken.decode(text[:position] + other + text[position + 1 :], now=NOW)


def test_an_expired_token_is_told_from_a_damaged_one(issuer: Issuer) -> None:
    token = issuer.token(life_s=60)
    with pytest.raises(TokenError, match="expired"):
        JoinToken.decode(token.credential, now=NOW + 3600)
    with pytest.raises(TokenError, match="damaged or cut short"):
        JoinToken.decode(token.credential[:-3], now=NOW + 3600)


def test_a_membership_does_not_outlive_its_token_and_is_renewed_before(issuer: Issuer) -> None:
    member = issuer.member(token=issuer.token(life_s=3600))
    assert member.certificate.expires_at == NOW + 3600
    lasting = issuer.member()
    assert lasting.certificate.expires_at == NOW + CERTIFICATE_LIFE_S
    issuer.clock.now += CERTIFICATE_LIFE_S / 2
    renewed = issuer.authority.renew(lasting.signed, lasting.peer_id)
    assert renewed.expires_at == issuer.clock.now + CERTIFICATE_LIFE_S
    with pytest.raises(NotAdmitted) as caught:
        issuer.authority.renew(lasting.signed, new_peer())
    assert caught.value.reason == Refusal.FOREIGN_PEER


def test_a_token_may_bring_several_peers_and_be_revoked_for_all_of_them(issuer: Issuer) -> None:
    token = issuer.token()
    members = [issuer.member(token=token) for _ in range(3)]
    other = issuer.member()
    issuer.authority.revoke(token.token_id[:6])
    for member in members:
        with pytest.raises(NotAdmitted, match="revoked"):
            issuer.authority.renew(member.signed, member.peer_id)
    issuer.authority.renew(other.signed, other.peer_id)


def test_rotation_keeps_members_that_have_been_seen_since(issuer: Issuer) -> None:
    seen, unseen = issuer.member(), issuer.member()
    trust = issuer.trust_source()
    issuer.authority.rotate()
    trust.offer(issuer.authority.signed_trust())
    renewed = issuer.authority.sign(issuer.authority.renew(seen.signed, seen.peer_id))
    late = issuer.trust_source()
    issuer.authority.retire()
    trust.offer(issuer.authority.signed_trust())
    Certificate.verify(renewed, trust.current, now=NOW, peer_id=seen.peer_id)
    with pytest.raises(NotAdmitted) as caught:
        Certificate.verify(unseen.signed, trust.current, now=NOW, peer_id=unseen.peer_id)
    assert caught.value.reason == Refusal.UNKNOWN_KEY
    assert late.offer(issuer.authority.signed_trust())  # who has seen both keys can follow
    usable = {entry.id for entry in issuer.authority.tokens() if issuer.authority.is_usable(entry)}
    assert not usable & {seen.token_id, unseen.token_id}


def test_who_has_slept_through_a_rotation_follows_it_by_the_older_key(issuer: Issuer) -> None:
    asleep = issuer.trust_source()
    issuer.authority.rotate()
    issuer.authority.rotate()
    assert asleep.offer(issuer.authority.signed_trust())
    assert len(asleep.current.keys) == 3


def test_an_older_list_never_comes_back(issuer: Issuer) -> None:
    trust, member = issuer.trust_source(), issuer.member()
    before = issuer.authority.signed_trust()
    issuer.authority.revoke(member.token_id)
    assert trust.offer(issuer.authority.signed_trust())
    assert not trust.offer(before)
    assert member.token_id in trust.current.revoked


def test_listeners_hear_of_changes_and_not_of_new_dates(issuer: Issuer) -> None:
    trust, member, heard = issuer.trust_source(), issuer.member(), list[Trust]()
    silence = trust.listen(heard.append)
    issuer.clock.now += TRUST_REISSUE_S + 1
    assert not trust.offer(issuer.authority.signed_trust())
    assert trust.current.issued_at == issuer.clock.now
    assert heard == []
    issuer.authority.revoke(member.token_id)
    trust.offer(issuer.authority.signed_trust())
    assert [list_.revoked for list_ in heard] == [frozenset({member.token_id})]
    silence()
    issuer.authority.rotate()
    assert trust.offer(issuer.authority.signed_trust())
    assert len(heard) == 1


def test_a_list_of_strangers_is_refused(issuer: Issuer, tmp_path: Path) -> None:
    trust = issuer.trust_source()
    stranger = Issuer(tmp_path / "stranger")
    with pytest.raises(NotAdmitted) as caught:
        trust.offer(stranger.authority.signed_trust())
    assert caught.value.reason == Refusal.UNKNOWN_KEY
    assert trust.current == issuer.authority.trust


def test_a_full_list_of_revoked_tokens_can_be_sent() -> None:
    keys = [SigningKey.generate() for _ in range(4)]
    revoked = frozenset(os.urandom(8).hex() for _ in range(MAX_REVOKED))
    trust = Trust(swarm="s" * 128, keys=tuple(key.public for key in keys), version=1, issued_at=NOW, revoked=revoked)
    data = trust.sign(keys)
    assert len(data) <= MAX_TRUST_BYTES
    source = TrustSource(Trust(swarm="s" * 128, keys=trust.keys[:1]))
    assert source.offer(data)
    assert source.current == trust


def test_expired_tokens_leave_the_ledger_and_the_list(issuer: Issuer) -> None:
    token = issuer.token(life_s=60)
    issuer.authority.revoke(token.token_id)
    assert token.token_id in issuer.authority.trust.revoked
    issuer.clock.now += 3600
    assert token.token_id not in issuer.authority.trust.revoked
    assert issuer.authority.tokens() == ()


def test_the_coordinator_sees_what_a_command_changes_beside_it(issuer: Issuer, tmp_path: Path) -> None:
    member = issuer.member()
    assert not issuer.authority.refresh()
    Authority.existing(tmp_path / "state", clock=issuer.clock).revoke(member.token_id)
    assert issuer.authority.refresh()
    assert member.token_id in issuer.authority.trust.revoked


def test_a_token_that_a_command_has_made_is_good_at_once(issuer: Issuer, tmp_path: Path) -> None:
    beside = Authority.existing(tmp_path / "state", clock=issuer.clock)
    beside.rotate()
    token, peer = beside.create_token(Role.CLIENT), new_peer()
    assert issuer.authority.admit(token.credential, peer).token_id == token.token_id
    beside.revoke(token.token_id)
    with pytest.raises(NotAdmitted, match="revoked"):
        issuer.authority.admit(token.credential, peer)


def test_changes_at_the_same_time_are_all_kept(issuer: Issuer, tmp_path: Path) -> None:
    authorities = [Authority(tmp_path / "state", clock=issuer.clock) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda own=own: [own.create_token(Role.CLIENT) for _ in range(5)])
        for own in authorities
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    issuer.authority.refresh()
    assert len(issuer.authority.tokens()) == 20


def test_restored_from_a_backup_the_list_is_still_newer_than_what_members_have(issuer: Issuer, tmp_path: Path) -> None:
    file = tmp_path / "state/credentials.json"
    backup, trust = file.read_bytes(), issuer.trust_source()
    for member in [issuer.member() for _ in range(3)]:
        issuer.authority.revoke(member.token_id)
    trust.offer(issuer.authority.signed_trust())
    file.write_bytes(backup)
    issuer.clock.now += 60
    restored = Authority(tmp_path / "state", clock=issuer.clock)
    restored.rotate()
    assert trust.offer(restored.signed_trust())


@pytest.mark.parametrize("contents", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1, "keys": ["00"]}'])
def test_a_damaged_ledger_is_not_taken_for_an_empty_one(contents: str, tmp_path: Path) -> None:
    (tmp_path / "credentials.json").write_text(contents)
    with pytest.raises(TokenError, match="damaged"):
        Authority(tmp_path, clock=Clock())


def test_a_folder_without_state_is_not_made_into_one_by_mistake(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match="not a coordinator's state"):
        Authority.existing(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_tokens_are_made_once_the_swarm_has_an_address(tmp_path: Path) -> None:
    authority = Authority(tmp_path, clock=Clock())
    with pytest.raises(TokenError, match="start it"):
        authority.create_token(Role.CLIENT)
    assert LedgerFile(tmp_path).load() is not None


@pytest.mark.parametrize("token_id", ["", "zz", "0123"])
def test_what_is_revoked_must_be_one_token(issuer: Issuer, token_id: str) -> None:
    issuer.token()
    with pytest.raises(TokenError, match="not the id of one token"):
        issuer.authority.revoke(token_id)


def test_names_are_fit_to_be_printed(issuer: Issuer) -> None:
    with pytest.raises(TokenError, match="printable"):
        issuer.token(name="me\x1b[2J")


def test_one_token_seats_so_many_machines_until_their_certificates_expire(issuer: Issuer) -> None:
    issuer.authority.peers_per_token = 3
    token, servers = issuer.token(Role.SERVER, life_s=30 * 86400.0), [new_peer() for _ in range(3)]
    members = [issuer.member(token=token, peer_id=server) for server in servers]
    with pytest.raises(Busy, match="too many machines"):
        issuer.member(token=token)
    issuer.member(token=token, peer_id=servers[0])
    issuer.member(Role.SERVER)
    issuer.clock.now += CERTIFICATE_LIFE_S - 1
    issuer.authority.renew(members[0].signed, servers[0])
    issuer.clock.now += 2
    for _ in range(2):
        issuer.member(token=token)
    with pytest.raises(Busy, match="too many machines"):
        issuer.member(token=token)
