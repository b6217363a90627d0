"""libp2p peer ids of Ed25519 keys: they contain the public key itself, so that signatures can be checked by them."""

import functools

import base58

from geopetals.credentials.keys import KEY_BYTES, PublicKey

_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
"""An identity multihash of 36 bytes: a protobuf of key type 1 (Ed25519) and 32 bytes of key."""
_MOST_CHARACTERS = 64


def key_of_peer(peer_id: str) -> PublicKey:
    """Raises ValueError for what is no Ed25519 peer id in base58."""
    if len(peer_id) > _MOST_CHARACTERS:
        raise ValueError("a peer id is too long")
    data = base58.b58decode(peer_id)
    if len(data) != len(_PREFIX) + KEY_BYTES or not data.startswith(_PREFIX):
        raise ValueError("this is not the peer id of an Ed25519 key")
    return PublicKey(data[len(_PREFIX) :])


def peer_of_key(key: PublicKey) -> str:
    return base58.b58encode(_PREFIX + key.raw).decode()


@functools.lru_cache(maxsize=16384)
def pack_peer(peer_id: str) -> bytes:
    """As bytes: about a third less to sign and send. Raises ValueError for what is no base58."""
    return base58.b58decode(peer_id)


def unpack_peer(data: bytes) -> str:
    return base58.b58encode(data).decode()
