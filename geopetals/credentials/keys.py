"""A swarm's Ed25519 keys. A key's id is the first eight bytes of the sha256 of its public half."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

KEY_BYTES, KEY_ID_BYTES, SIGNATURE_BYTES = 32, 8, 64


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The 32 bytes that everybody may know. Raises ValueError for another number of bytes."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise ValueError(f"a public key has {KEY_BYTES} bytes")

    @property
    def id(self) -> bytes:
        return hashlib.sha256(self.raw).digest()[:KEY_ID_BYTES]

    def verifies(self, signature: bytes, message: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


class SigningKey:
    """The secret half. It is written to a file of its owner's only, and never shown."""

    __slots__ = ("_key", "public")

    def __init__(self, secret: bytes) -> None:
        """`secret`: 32 bytes, as `secret()` gave them. Raises ValueError for another number of bytes."""
        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self.public = PublicKey(self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    @classmethod
    def generate(cls) -> "SigningKey":
        return cls(Ed25519PrivateKey.generate().private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))

    @property
    def id(self) -> bytes:
        return self.public.id

    def secret(self) -> bytes:
        return self._key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"SigningKey(id={self.id.hex()})"


def by_id(keys: Iterable[PublicKey]) -> Mapping[bytes, PublicKey]:
    return {key.id: key for key in keys}
