"""What a swarm trusts now: its keys and what it has revoked, as a signed list with a version number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from geopetals.credentials.envelope import Fields, seal, unseal
from geopetals.credentials.keys import KEY_BYTES, PublicKey, SigningKey, by_id
from geopetals.credentials.refusal import Refusal, refused

SKEW_S = 60.0
"""Clocks of two machines may differ by this much: nothing expires earlier for it, and the future begins later."""
MAX_TRUST_BYTES = 2**16
MAX_REVOKED = 4096
TOKEN_ID_BYTES = 8
_MAX_KEYS = 4
_KIND = "trust list"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Of one swarm. `issued_at`: Unix time in seconds. `revoked`: ids of join tokens, in hexadecimal.

    A revoked token's certificates and tickets are revoked with it. Ids of tokens that have expired need not be listed.
    """

    swarm: str
    keys: tuple[PublicKey, ...]
    version: int = 0
    issued_at: float = 0.0
    revoked: frozenset[str] = frozenset()
    open: bool = False

    @property
    def by_id(self) -> Mapping[bytes, PublicKey]:
        return by_id(self.keys)

    def sign(self, keys: Sequence[SigningKey]) -> bytes:
        """Signed by all active keys: who knows but one of them can follow a rotation."""
        body = {
            "s": self.swarm,
            "n": self.version,
            "t": int(self.issued_at),
            "k": [key.raw for key in self.keys],
            "r": [bytes.fromhex(token_id) for token_id in sorted(self.revoked)],
            "o": self.open,
        }
        return seal(_KIND, body, keys)

    def read(self, data: bytes) -> "Trust":
        """A list that this one vouches for. Raises NotAdmitted."""
        fields, _ = unseal(_KIND, data, self.by_id, limit=MAX_TRUST_BYTES)
        if fields.text("s") != self.swarm:
            raise refused(Refusal.FOREIGN_SWARM, "the trust list is of another swarm.")
        return Trust(
            swarm=self.swarm,
            keys=_keys(fields),
            version=fields.count("n"),
            issued_at=float(fields.count("t")),
            revoked=_revoked(fields),
            open=fields.flag("o"),
        )

    def check_token(self, token_id: str, what: str) -> None:
        """Raises NotAdmitted if the join token behind a credential has been revoked."""
        if token_id in self.revoked:
            raise refused(Refusal.REVOKED, f"the join token behind this {what} has been revoked: ask for a new one.")


def check_time(what: str, *, now: float, expires_at: float, issued_at: float = 0.0) -> None:
    """Raises NotAdmitted for what has expired, or comes from the future."""
    if now > expires_at + SKEW_S:
        raise refused(Refusal.EXPIRED, f"the {what} has expired: ask for a new one.")
    if issued_at > now + SKEW_S:
        raise refused(Refusal.NOT_YET, f"the {what} is not valid yet: is this machine's clock right?")


def _keys(fields: Fields) -> tuple[PublicKey, ...]:
    raw = fields.items("k", most=_MAX_KEYS)
    if not raw or not all(isinstance(key, bytes) and len(key) == KEY_BYTES for key in raw):
        raise fields.wrong("k")
    return tuple(map(PublicKey, raw))


def _revoked(fields: Fields) -> frozenset[str]:
    raw = fields.items("r", most=MAX_REVOKED)
    if not all(isinstance(token_id, bytes) and len(token_id) == TOKEN_ID_BYTES for token_id in raw):
        raise fields.wrong("r")
    return frozenset(token_id.hex() for token_id in raw)


class TrustSource:
    """The newest list that this process has seen. An older one never takes its place."""

    def __init__(self, start: Trust) -> None:
        """`start`: what the join token says."""
        self.current = start
        self.signed: bytes | None = None
        """The list as it was signed, to pass on; None before the first one came."""
        self._listeners: list[Callable[[Trust], None]] = []

    def listen(self, listener: Callable[[Trust], None]) -> Callable[[], None]:
        """Have `listener` called when keys or revocations change; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def offer(self, data: bytes) -> bool:
        """Take a list if it is newer; returns whether anything about trust changed. Raises NotAdmitted if forged."""
        if data == self.signed:
            return False
        offered, current = self.current.read(data), self.current
        if (offered.version, offered.issued_at) <= (current.version, current.issued_at):
            return False
        self.current, self.signed = offered, data
        if offered.version == current.version:
            return False
        for listener in list(self._listeners):
            listener(offered)
        return True
