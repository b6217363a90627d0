"""What every credential is wrapped in: msgpack [body, [[key id, signature], ...]], the body a msgpack map.

A signature covers the kind of credential and the whole body, so that none passes for one of another kind. Unknown keys
of a body are ignored, so that later additions do not break old readers.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgpack

from geopetals.credentials.keys import KEY_ID_BYTES, SIGNATURE_BYTES, PublicKey, SigningKey
from geopetals.credentials.refusal import Refusal, refused

_MAX_SIGNATURES = 4


def seal(kind: str, body: Mapping[str, Any], keys: Sequence[SigningKey]) -> bytes:
    """Signed by each of the keys, of which the newest ones count if there are too many."""
    packed = msgpack.packb(dict(body))
    message = _message(kind, packed)
    signatures = [[key.id, key.sign(message)] for key in keys[-_MAX_SIGNATURES:]]
    data: bytes = msgpack.packb([packed, signatures])
    return data


def unseal(kind: str, data: bytes, keys: Mapping[bytes, PublicKey], *, limit: int) -> tuple["Fields", bytes]:
    """The body and the id of the key that vouches for it. Raises NotAdmitted. `limit`: bytes at most."""
    packed, signatures = _open(kind, data, limit)
    message = _message(kind, packed)
    known = [(keys[key_id], signature) for key_id, signature in signatures if key_id in keys]
    if not known:
        raise refused(Refusal.UNKNOWN_KEY, f"the {kind} is signed with a key that this swarm does not use (any more).")
    for key, signature in known:
        if not key.verifies(signature, message):
            raise refused(Refusal.FORGED, f"the {kind} does not bear a valid signature.")
    return Fields(kind, _unpack(kind, packed)), known[0][0].id


def unseal_unverified(kind: str, data: bytes, *, limit: int) -> "Fields":
    """The body of what names its own keys; the caller has yet to check the signatures by them."""
    packed, _ = _open(kind, data, limit)
    return Fields(kind, _unpack(kind, packed))


class Fields:
    """A body whose values are of the kind that is asked for; raises NotAdmitted if one is not."""

    def __init__(self, kind: str, values: Mapping[str, Any]) -> None:
        self._kind, self._values = kind, values

    def text(self, key: str, *, most: int = 200) -> str:
        value = self._values.get(key)
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            raise self.wrong(key)
        return value

    def data(self, key: str, *, most: int, least: int = 0) -> bytes:
        value = self._values.get(key)
        if not isinstance(value, bytes) or not least <= len(value) <= most:
            raise self.wrong(key)
        return value

    def count(self, key: str, *, most: int = 2**40) -> int:
        value = self._values.get(key)
        if type(value) is not int or not 0 <= value <= most:
            raise self.wrong(key)
        return value

    def flag(self, key: str) -> bool:
        return self._values.get(key) is True

    def items(self, key: str, *, most: int) -> list[Any]:
        value = self._values.get(key, [])
        if not isinstance(value, list) or len(value) > most:
            raise self.wrong(key)
        return value

    def raw(self, key: str) -> Any:
        return self._values.get(key)

    def wrong(self, key: str) -> Exception:
        return refused(Refusal.MALFORMED, f"the {self._kind} has no right field {key!r}.")


def _open(kind: str, data: bytes, limit: int) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    if not data:
        raise refused(Refusal.MISSING, f"there is no {kind}.")
    if len(data) > limit:
        raise refused(Refusal.MALFORMED, f"a {kind} has at most {limit} bytes.")
    outer = _unpack_any(kind, data)
    if not isinstance(outer, list) or len(outer) != 2 or not isinstance(outer[0], bytes):
        raise refused(Refusal.MALFORMED, f"this is no {kind}.")
    return outer[0], list(_signatures(kind, outer[1]))


def _signatures(kind: str, listed: Any) -> Iterable[tuple[bytes, bytes]]:
    if not isinstance(listed, list) or not 1 <= len(listed) <= _MAX_SIGNATURES:
        raise refused(Refusal.MALFORMED, f"the {kind} is not signed.")
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, bytes) for part in entry):
            raise refused(Refusal.MALFORMED, f"the {kind} is not signed as it should be.")
        key_id, signature = entry
        if len(key_id) != KEY_ID_BYTES or len(signature) != SIGNATURE_BYTES:
            raise refused(Refusal.MALFORMED, f"the {kind} is not signed as it should be.")
        yield key_id, signature


def _unpack(kind: str, packed: bytes) -> Mapping[str, Any]:
    body = _unpack_any(kind, packed)
    if not isinstance(body, dict):
        raise refused(Refusal.MALFORMED, f"this is no {kind}.")
    return body


def _unpack_any(kind: str, data: bytes) -> Any:
    try:
        return msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException, RecursionError):
        raise refused(Refusal.MALFORMED, f"this is no {kind}.") from None


def _message(kind: str, packed: bytes) -> bytes:
    return b"geopetals/" + kind.encode() + b"/1\x00" + packed
