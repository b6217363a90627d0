"""The join token: one string that a person pastes to bring a machine or a client into a swarm.

Version 1, `gp1` followed by base58check of a msgpack map, is an address without a credential, of swarms that have no
coordinator. Its keys are s (swarm), m (model), i (identity) and p (peers).

Version 2, `gp2` and base58check of a signed envelope, is a bearer credential: whoever has it may join, so that it is
never logged. Its body has the same keys and also c (the coordinator's peer id and addresses), k (the swarm's public
keys), r (role), t (the token's id), x (when it expires), y (relays) and o (open to stock clients); the signature covers
all of it. Checksums tell mistyped or truncated tokens from tokens of another version; unknown keys are ignored, so that
later additions do not break old readers; a change of meaning takes a new number in the prefix.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import base58
import msgpack

from geopetals.credentials.certificate import Role
from geopetals.credentials.envelope import Fields, seal, unseal, unseal_unverified
from geopetals.credentials.keys import KEY_BYTES, PublicKey, SigningKey, by_id
from geopetals.credentials.trust import TOKEN_ID_BYTES, Trust, check_time
from geopetals.errors import NotAdmitted, SwarmMismatch, TokenError
from geopetals.swarm.identity import ModelIdentity

_PREFIX, _SIGNED_PREFIX = "gp1", "gp2"
_KIND = "join token"
MAX_TOKEN_CHARACTERS = 8192
MAX_PEERS = 8
_MAX_KEYS = 4
_MAX_ADDRESS = 384
_HEX = re.compile(r"(?:[0-9a-f]{2}){16,}")
_SWARM_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorAddress:
    """Who coordinates the swarm; `addresses` are libp2p addresses that end in its peer id."""

    peer_id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    """Where a swarm is, what it serves and, with a coordinator, as what its bearer may join.

    `swarm` is the DHT prefix of its blocks, `model` the name to load the model by (a Hub id, or the name of a local
    directory), `peers` the libp2p addresses (`/ip4/.../tcp/.../p2p/...`) of those that introduce newcomers. All further
    fields are of version 2: `expires_at` is Unix time in seconds, `token_id` is what it can be revoked by, `credential`
    the whole token as it is pasted, which the coordinator asks for.
    """

    swarm: str
    model: str
    identity: ModelIdentity
    peers: tuple[str, ...]
    coordinator: CoordinatorAddress | None = None
    keys: tuple[PublicKey, ...] = ()
    role: Role | None = None
    token_id: str = ""
    expires_at: float = 0.0
    relays: tuple[str, ...] = ()
    open: bool = False
    credential: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        check_swarm_name(self.swarm)
        if not self.peers or len(self.peers) > MAX_PEERS:
            raise TokenError(f"a join token names 1 to {MAX_PEERS} peers, but got {len(self.peers)}.")
        if not self.model.isprintable() or not 0 < len(self.model) <= _MAX_ADDRESS:
            raise TokenError(f"a model's name has 1 to {_MAX_ADDRESS} printable characters.")
        addresses = (*self.peers, *self.relays, *(self.coordinator.addresses if self.coordinator else ()))
        if len(self.relays) > MAX_PEERS or not all(map(_is_address, addresses)):
            raise TokenError("a peer's address looks like /ip4/1.2.3.4/tcp/31330/p2p/<peer id>.")

    @property
    def trust(self) -> Trust:
        """What its bearer trusts before the first list comes from the swarm."""
        return Trust(swarm=self.swarm, keys=self.keys, open=self.open)

    def encode(self) -> str:
        if self.coordinator is not None:
            return self.credential
        return _PREFIX + base58.b58encode_check(msgpack.packb(self._address_fields())).decode()

    def sign(self, keys: Sequence[SigningKey]) -> "JoinToken":
        """The token of version 2, with its credential, vouched for by each of the keys."""
        assert self.coordinator is not None
        assert self.role is not None
        introducers = [peer for peer in self.peers if peer not in self.coordinator.addresses]
        body = self._address_fields() | {
            "p": introducers,
            "c": [self.coordinator.peer_id, list(self.coordinator.addresses)],
            "k": [key.raw for key in self.keys],
            "r": self.role.value,
            "t": bytes.fromhex(self.token_id),
            "x": int(self.expires_at),
            "y": list(self.relays),
            "o": self.open,
        }
        return replace(self, credential=_SIGNED_PREFIX + base58.b58encode_check(seal(_KIND, body, keys)).decode())

    def _address_fields(self) -> dict[str, Any]:
        return {
            "s": self.swarm,
            "m": self.model,
            "i": {key: _shorten(value) for key, value in self.identity.to_dict().items()},
            "p": list(self.peers),
        }

    @classmethod
    def decode(cls, text: str, *, now: float | None = None) -> "JoinToken":
        """Read a pasted token. `now` is Unix time, the clock's if None.

        Raises TokenError that tells truncated, foreign, newer, forged and expired tokens apart.
        """
        text = "".join(text.split())
        if not text.startswith("gp") or len(text) > MAX_TOKEN_CHARACTERS:
            raise TokenError("this is not a join token: it starts with 'gp1' or 'gp2' and is printed by the swarm.")
        if text.startswith(_PREFIX):
            return cls._from_fields(_unpack(_payload(text)))
        if not text.startswith(_SIGNED_PREFIX):
            raise TokenError("this join token is of another version: update geopetals on this machine or the other.")
        try:
            token = read_credential(text)
            check_time(_KIND, now=time.time() if now is None else now, expires_at=token.expires_at)
        except NotAdmitted as error:
            raise TokenError(str(error)) from None
        return token

    @classmethod
    def _from_fields(cls, fields: Any, **more: Any) -> "JoinToken":
        try:
            swarm, model, peers = fields["s"], fields["m"], fields["p"]
            identity = ModelIdentity.from_dict({key: _lengthen(value) for key, value in fields["i"].items()})
        except (KeyError, TypeError, AttributeError, SwarmMismatch):
            raise TokenError("the join token lacks a field: ask for a new one from the swarm.") from None
        if not isinstance(swarm, str) or not isinstance(model, str) or not isinstance(peers, list):
            raise TokenError("the join token has a field of a wrong kind: ask for a new one from the swarm.")
        coordinator = more.get("coordinator")
        known = coordinator.addresses if coordinator is not None else ()
        everybody = (*known, *(str(peer) for peer in peers))
        return cls(swarm=swarm, model=model, identity=identity, peers=everybody, **more)


def read_credential(text: str, *, signers: Sequence[PublicKey] | None = None) -> JoinToken:
    """A pasted token of version 2, expired or not, that one of `signers` has signed.

    None takes the keys that it names itself: good for its bearer, who trusts whom the token is from. Raises TokenError
    for what is damaged and NotAdmitted.
    """
    if not text.startswith(_SIGNED_PREFIX):
        raise TokenError("this is not the join token of a swarm with a coordinator: those start with 'gp2'.")
    payload = _payload(text)
    claimed = unseal_unverified(_KIND, payload, limit=MAX_TOKEN_CHARACTERS)
    raw_keys = claimed.items("k", most=_MAX_KEYS)
    if not raw_keys or not all(isinstance(key, bytes) and len(key) == KEY_BYTES for key in raw_keys):
        raise claimed.wrong("k")
    keys = tuple(map(PublicKey, raw_keys))
    fields, _ = unseal(_KIND, payload, by_id(keys if signers is None else signers), limit=MAX_TOKEN_CHARACTERS)
    return JoinToken._from_fields(
        {key: fields.raw(key) for key in "smip"},
        coordinator=_coordinator(fields),
        keys=keys,
        role=_role(fields),
        token_id=fields.data("t", least=TOKEN_ID_BYTES, most=TOKEN_ID_BYTES).hex(),
        expires_at=float(fields.count("x")),
        relays=tuple(str(relay) for relay in fields.items("y", most=MAX_PEERS)),
        open=fields.flag("o"),
        credential=text,
    )


def _coordinator(fields: Fields) -> CoordinatorAddress:
    named = fields.items("c", most=2)
    if len(named) != 2 or not isinstance(named[0], str) or not isinstance(named[1], list):
        raise fields.wrong("c")
    addresses = tuple(str(address) for address in named[1])
    if not addresses or not all(address.endswith(f"/p2p/{named[0]}") for address in addresses):
        raise fields.wrong("c")
    return CoordinatorAddress(peer_id=named[0], addresses=addresses)


def _role(fields: Fields) -> Role:
    try:
        return Role(fields.text("r"))
    except ValueError:
        raise fields.wrong("r") from None


def _is_address(text: str) -> bool:
    return text.startswith("/") and "/p2p/" in text and len(text) <= _MAX_ADDRESS


def _shorten(value: str | None) -> str | bytes | None:
    """Hashes as bytes: half as many characters to paste."""
    return bytes.fromhex(value) if value is not None and _HEX.fullmatch(value) else value


def _lengthen(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value


def _payload(text: str) -> bytes:
    try:
        return base58.b58decode_check(text[len(_PREFIX) :])
    except ValueError:
        raise TokenError("the join token is damaged or cut short: copy the whole of it once more.") from None


def _unpack(payload: bytes) -> Any:
    try:
        return msgpack.unpackb(payload)
    except (ValueError, msgpack.UnpackException):
        raise TokenError("the join token cannot be read: ask for a new one from the swarm.") from None


def check_swarm_name(name: str) -> str:
    """The name itself; raises TokenError if it cannot be a DHT prefix."""
    if not _SWARM_NAME.fullmatch(name):
        raise TokenError(f"a swarm's name consists of 1 to 128 letters, digits, '-' and '_', but got {name!r}.")
    return name


def swarm_name_for(model: str) -> str:
    """The DHT prefix that server and client derive from a model's name when no token tells it, as PETALS does."""
    short = model.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9_-]", "-", short)[:128] or "model"
