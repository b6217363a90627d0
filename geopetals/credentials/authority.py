"""Who gives out credentials: the coordinator, or an operator in its state folder while it runs or not."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from geopetals.credentials.certificate import Certificate, Role
from geopetals.credentials.keys import PublicKey, SigningKey
from geopetals.credentials.ledger import Ledger, LedgerChange, LedgerFile, SwarmFacts, TokenEntry
from geopetals.credentials.refusal import Refusal, refused
from geopetals.credentials.ticket import Ticket
from geopetals.credentials.trust import MAX_REVOKED, SKEW_S, TOKEN_ID_BYTES, Trust
from geopetals.errors import Busy, TokenError
from geopetals.join_token import MAX_PEERS, MAX_TOKEN_CHARACTERS, CoordinatorAddress, JoinToken, read_credential
from geopetals.swarm.identity import ModelIdentity

CERTIFICATE_LIFE_S = 7 * 86400.0
"""A member without the coordinator for longer has to see it again."""
TRUST_REISSUE_S = 300.0
"""An unchanged trust list is signed again after this time: copies in the DHT live as long as its date allows."""
TOKEN_LIFE_S = 30 * 86400.0
_MAX_KEYS = 4
_MAX_TOKENS = 10_000
_MAX_NAME = 100
PEERS_PER_TOKEN = 256
_MAX_ADDRESSES, _MAX_RELAYS = 4, 4


class Authority:
    """The keys, the ledger of join tokens and the trust list of one swarm."""

    def __init__(
        self, folder: Path, *, clock: Callable[[], float] = time.time, peers_per_token: int = PEERS_PER_TOKEN
    ) -> None:
        """Opens the ledger in `folder`, which is made with its first key if it is not there. Raises TokenError.

        `peers_per_token`: so many servers may have certificates behind one join token, and so many members be there.
        """
        _make_folder(folder)
        self.peers_per_token = peers_per_token
        self._seats: dict[str, dict[str, float]] = {}
        self._file, self._clock = LedgerFile(folder), clock
        with self._file.changing() as change:
            if change.ledger is None:
                change.ledger = Ledger(keys=(SigningKey.generate(),), version=int(clock()))
        self._stamp = self._file.stamp()
        self._ledger = change.ledger
        self._signed: tuple[Trust, bytes] | None = None

    @classmethod
    def existing(cls, folder: Path, *, clock: Callable[[], float] = time.time) -> "Authority":
        """Raises TokenError if no coordinator has kept its state in the folder."""
        if LedgerFile(folder).load() is None:
            raise TokenError(f"{folder} is not a coordinator's state: pass what its --state was.")
        return cls(folder, clock=clock)

    def refresh(self) -> bool:
        """Read the ledger again if another process has changed it; returns whether it has. Costs one stat()."""
        stamp = self._file.stamp()
        if stamp == self._stamp:
            return False
        ledger = self._file.load()
        if ledger is None:
            raise TokenError(f"{self._file.path} is gone: restore it from a backup.")
        self._ledger, self._stamp, self._signed = ledger, stamp, None
        return True

    def describe_swarm(self, facts: SwarmFacts) -> None:
        """What join tokens shall say from now on; of many addresses the first ones, for a token is pasted by hand."""
        kept = replace(facts, addresses=facts.addresses[:_MAX_ADDRESSES], relays=facts.relays[:_MAX_RELAYS])
        self._change(lambda change: change.update(facts=kept))

    @property
    def facts(self) -> SwarmFacts | None:
        """What join tokens say; None before the coordinator has run for the first time."""
        return self._ledger.facts

    # -- join tokens ---------------------------------------------------------------------------------------------------

    def create_token(self, role: Role, *, name: str = "", life_s: float = TOKEN_LIFE_S) -> JoinToken:
        """`name`: whom it is for. Raises TokenError before the coordinator has run for the first time."""
        if not name.isprintable() or len(name) > _MAX_NAME:
            raise TokenError(f"a token's name has at most {_MAX_NAME} printable characters.")
        facts, now = self._ledger.facts, float(int(self._clock()))
        if facts is None:
            raise TokenError("the coordinator has not run with this state yet: start it, then make tokens.")
        entry = TokenEntry(
            id=os.urandom(TOKEN_ID_BYTES).hex(),
            role=role,
            name=name,
            created_at=now,
            expires_at=now + int(life_s),
            key_id=self._ledger.keys[-1].id.hex(),
        )
        token = JoinToken(
            swarm=facts.swarm,
            model=facts.model,
            identity=ModelIdentity.from_dict(facts.identity),
            peers=tuple(dict.fromkeys((*facts.addresses, *facts.peers)))[:MAX_PEERS],
            coordinator=CoordinatorAddress(peer_id=facts.coordinator_peer_id, addresses=facts.addresses),
            keys=self.trust.keys,
            role=role,
            token_id=entry.id,
            expires_at=entry.expires_at,
            relays=facts.relays,
            open=facts.open,
        ).sign(self._ledger.keys[-1:])
        self._change(lambda change: _add(change, entry, now))
        return token

    def tokens(self) -> tuple[TokenEntry, ...]:
        """All that have not expired, oldest first."""
        return _unexpired(self._ledger.tokens, self._clock())

    def is_usable(self, entry: TokenEntry) -> bool:
        """Whether its bearer can still join: it is not revoked, and its key not retired."""
        return entry.revoked_at is None and entry.key_id in {key.id.hex() for key in self.keys}

    def revoke(self, token_id: str) -> TokenEntry:
        """End a token with all certificates and tickets behind it. Raises TokenError for an unknown id."""
        now = self._clock()

        def change_entry(change: LedgerChange) -> None:
            assert change.ledger is not None
            found = [entry for entry in change.ledger.tokens if entry.id.startswith(token_id)] if token_id else []
            if len(found) != 1:
                raise TokenError(f"{token_id!r} is not the id of one token: `geopetals token list` prints them.")
            revoked = replace(found[0], revoked_at=found[0].revoked_at or now)
            tokens = tuple(revoked if entry.id == revoked.id else entry for entry in change.ledger.tokens)
            if sum(entry.revoked_at is not None for entry in _unexpired(tokens, now)) > MAX_REVOKED:
                raise TokenError("too many tokens are revoked: `geopetals token rotate --retire` ends them all.")
            change.update(tokens=tokens, version=_next_version(change.ledger, now))

        self._change(change_entry)
        return next(entry for entry in self._ledger.tokens if entry.id.startswith(token_id))

    # -- keys ----------------------------------------------------------------------------------------------------------

    def rotate(self) -> str:
        """Sign with a new key from now on; older ones go on to be trusted until `retire`. Returns the key's id."""
        key = SigningKey.generate()

        def add(change: LedgerChange) -> None:
            assert change.ledger is not None
            if len(change.ledger.keys) >= _MAX_KEYS:
                raise TokenError(f"{_MAX_KEYS} keys are in use: `geopetals token rotate --retire` ends the older ones.")
            change.update(keys=(*change.ledger.keys, key), version=_next_version(change.ledger, self._clock()))

        self._change(add)
        return key.id.hex()

    def retire(self) -> int:
        """End all keys but the newest, with every join token, certificate and ticket that they signed.

        Members whose certificates `renew` has signed with the newest key stay. Returns how many keys ended.
        """
        count = len(self._ledger.keys) - 1

        def drop(change: LedgerChange) -> None:
            assert change.ledger is not None
            change.update(keys=change.ledger.keys[-1:], version=_next_version(change.ledger, self._clock()))

        self._change(drop)
        return count

    # -- members -------------------------------------------------------------------------------------------------------

    def admit(self, pasted: str, peer_id: str) -> Certificate:
        """The certificate for a peer that shows a join token.

        Raises NotAdmitted with the reason, and TokenError if the ledger cannot be read any more.
        """
        if not pasted:
            raise refused(Refusal.MISSING, "there is no join token.")
        self.refresh()  # it may have been made a moment ago
        try:
            token = read_credential(pasted[:MAX_TOKEN_CHARACTERS], signers=self.trust.keys)
        except TokenError as error:
            raise refused(Refusal.MALFORMED, str(error)) from None
        if token.swarm != self.trust.swarm:
            raise refused(Refusal.FOREIGN_SWARM, "the join token is of another swarm.")
        return self._admit_known(token, peer_id)

    def _admit_known(self, token: JoinToken, peer_id: str) -> Certificate:
        entry, now = self._entry(token.token_id), self._clock()
        if now > token.expires_at + SKEW_S:
            raise refused(Refusal.EXPIRED, "the join token has expired: ask for a new one.")
        if entry is None or entry.role is not token.role:
            raise refused(Refusal.FORGED, "the join token is not one that this coordinator gave out.")
        self.trust.check_token(entry.id, "membership")
        certificate = self._certificate(entry.role, entry.id, peer_id, entry.expires_at, now)
        self._take_seat(certificate, now)
        return certificate

    def _take_seat(self, certificate: Certificate, now: float) -> None:
        """Certificates of servers and relays stand in everybody's records until they expire. Raises Busy."""
        if certificate.role not in (Role.SERVER, Role.RELAY):
            return
        taken = self._seats.setdefault(certificate.token_id, {})
        if certificate.peer_id not in taken and len(taken) >= self.peers_per_token:
            taken = {peer: until for peer, until in taken.items() if until >= now}
            self._seats[certificate.token_id] = taken
            if len(taken) >= self.peers_per_token:
                raise Busy("too many machines have joined with this token: ask for another one.", retry_after_s=3600.0)
        taken[certificate.peer_id] = certificate.expires_at

    def _entry(self, token_id: str) -> TokenEntry | None:
        return next((entry for entry in self._ledger.tokens if entry.id == token_id), None)

    def renew(self, certificate: bytes, peer_id: str) -> Certificate:
        """A fresh certificate, signed with the newest key, for one that is still good. Raises as `admit`."""
        self.refresh()
        now = self._clock()
        old = Certificate.verify(certificate, self.trust, now=now, peer_id=peer_id)
        entry = self._entry(old.token_id)
        if entry is None or now > entry.expires_at + SKEW_S:
            raise refused(Refusal.EXPIRED, "the join token behind this membership has expired: ask for a new one.")
        renewed = self._certificate(entry.role, entry.id, peer_id, entry.expires_at, now)
        self._take_seat(renewed, now)
        return renewed

    def _certificate(self, role: Role, token_id: str, peer_id: str, until: float, now: float) -> Certificate:
        return Certificate(
            swarm=self.trust.swarm,
            role=role,
            token_id=token_id,
            peer_id=peer_id,
            issued_at=float(int(now)),
            expires_at=float(int(min(until, now + CERTIFICATE_LIFE_S))),
        )

    def sign(self, credential: Certificate | Ticket) -> bytes:
        """With the newest key."""
        return credential.sign(self._ledger.keys[-1])

    # -- trust ---------------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> tuple[PublicKey, ...]:
        """Those that are in use, oldest first."""
        return tuple(key.public for key in self._ledger.keys)

    @property
    def trust(self) -> Trust:
        """Raises TokenError before the swarm has been described."""
        return self._current()[0]

    def signed_trust(self) -> bytes:
        """The list that members are sent; signed again from time to time although nothing has changed."""
        return self._current()[1]

    def _current(self) -> tuple[Trust, bytes]:
        now = self._clock()
        if self._signed is None or now - self._signed[0].issued_at > TRUST_REISSUE_S:
            trust = self._make_trust(now)
            self._signed = trust, trust.sign(self._ledger.keys)
        return self._signed

    def _make_trust(self, now: float) -> Trust:
        ledger = self._ledger
        if ledger.facts is None:
            raise TokenError("the coordinator has not run with this state yet: start it first.")
        return Trust(
            swarm=ledger.facts.swarm,
            keys=self.keys,
            version=ledger.version,
            issued_at=now,
            revoked=frozenset(entry.id for entry in _unexpired(ledger.tokens, now) if entry.revoked_at is not None),
            open=ledger.facts.open,
        )

    def _change(self, change_ledger: Callable[[LedgerChange], None]) -> None:
        with self._file.changing() as change:
            change_ledger(change)
        assert change.ledger is not None
        self._ledger, self._stamp, self._signed = change.ledger, self._file.stamp(), None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise TokenError(f"cannot make {folder} ({error.strerror}): choose another --state.") from error


def _add(change: LedgerChange, entry: TokenEntry, now: float) -> None:
    assert change.ledger is not None
    tokens = _unexpired(change.ledger.tokens, now)
    if len(tokens) >= _MAX_TOKENS:
        raise TokenError(f"{_MAX_TOKENS} tokens are valid already: revoke some, or let them expire.")
    change.update(tokens=(*tokens, entry))


def _unexpired(tokens: tuple[TokenEntry, ...], now: float) -> tuple[TokenEntry, ...]:
    """Those whose credentials could still be valid somewhere."""
    return tuple(entry for entry in tokens if now <= entry.expires_at + 2 * SKEW_S)


def _next_version(ledger: Ledger, now: float) -> int:
    """At least the time, so that a ledger restored from a backup does not fall behind what members have seen."""
    return max(ledger.version + 1, int(now))
