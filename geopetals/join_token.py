"""The join token: one string that a person pastes to bring a machine or a client into a swarm.

Format, version 1: `gp1` followed by base58check of a msgpack map. The four checksum bytes tell a mistyped or truncated
token from a token of another version. Its keys are s (swarm), m (model), i (identity) and p (peers); unknown keys
beside these are ignored, so that later additions do not break old readers; a change of meaning takes a new number in
the prefix. A version 1 token carries no credential: it is an address.
"""

import re
from dataclasses import dataclass
from typing import Any

import base58
import msgpack

from geopetals.errors import SwarmMismatch, TokenError
from geopetals.swarm.identity import ModelIdentity

_PREFIX = "gp1"
_MAX_LENGTH = 8192
_MAX_PEERS = 8
_MAX_ADDRESS = 384
_HEX = re.compile(r"(?:[0-9a-f]{2}){16,}")
_SWARM_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    """Where a swarm is and what it serves.

    `swarm` is the DHT prefix of its blocks, `model` the name to load the model by (a Hub id, or the name of a local
    directory), `peers` the libp2p addresses (`/ip4/.../tcp/.../p2p/...`) of servers that introduce newcomers.
    """

    swarm: str
    model: str
    identity: ModelIdentity
    peers: tuple[str, ...]

    def __post_init__(self) -> None:
        check_swarm_name(self.swarm)
        if not self.peers or len(self.peers) > _MAX_PEERS:
            raise TokenError(f"a join token names 1 to {_MAX_PEERS} peers, but got {len(self.peers)}.")
        if not self.model.isprintable() or not 0 < len(self.model) <= _MAX_ADDRESS:
            raise TokenError(f"a model's name has 1 to {_MAX_ADDRESS} printable characters.")
        if not all(peer.startswith("/") and "/p2p/" in peer and len(peer) <= _MAX_ADDRESS for peer in self.peers):
            raise TokenError("a peer's address looks like /ip4/1.2.3.4/tcp/31330/p2p/<peer id>.")

    def encode(self) -> str:
        fields = {
            "s": self.swarm,
            "m": self.model,
            "i": {key: _shorten(value) for key, value in self.identity.to_dict().items()},
            "p": list(self.peers),
        }
        return _PREFIX + base58.b58encode_check(msgpack.packb(fields)).decode()

    @classmethod
    def decode(cls, text: str) -> "JoinToken":
        """Read a pasted token; raises TokenError that tells truncated, foreign and newer tokens apart."""
        text = "".join(text.split())
        if not text.startswith("gp") or len(text) > _MAX_LENGTH:
            raise TokenError("this is not a join token: it starts with 'gp1' and is printed by `geopetals serve`.")
        if not text.startswith(_PREFIX):
            raise TokenError("this join token is of another version: update geopetals on this machine or the other.")
        try:
            payload = base58.b58decode_check(text[len(_PREFIX) :])
        except ValueError:
            raise TokenError("the join token is damaged or cut short: copy the whole of it once more.") from None
        return cls._from_fields(_unpack(payload))

    @classmethod
    def _from_fields(cls, fields: Any) -> "JoinToken":
        try:
            swarm, model, peers = fields["s"], fields["m"], fields["p"]
            identity = ModelIdentity.from_dict({key: _lengthen(value) for key, value in fields["i"].items()})
        except (KeyError, TypeError, AttributeError, SwarmMismatch):
            raise TokenError("the join token lacks a field: ask for a new one from the swarm.") from None
        if not isinstance(swarm, str) or not isinstance(model, str) or not isinstance(peers, list):
            raise TokenError("the join token has a field of a wrong kind: ask for a new one from the swarm.")
        return cls(swarm=swarm, model=model, identity=identity, peers=tuple(str(peer) for peer in peers))


def _shorten(value: str | None) -> str | bytes | None:
    """Hashes as bytes: half as many characters to paste."""
    return bytes.fromhex(value) if value is not None and _HEX.fullmatch(value) else value


def _lengthen(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value


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
