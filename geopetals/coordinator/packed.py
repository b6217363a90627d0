"""Answers to admins that may be too large for a frame as they are: the plan of a few hundred servers is megabytes."""

import zlib
from typing import Any

import msgpack

_PACK_BYTES = 2**18
_MOST_BYTES = 2**26
_KEY = "zlib"


def pack_answer(answer: dict[str, Any]) -> dict[str, Any]:
    """Compressed if it is large."""
    plain: bytes = msgpack.packb(answer)
    return answer if len(plain) < _PACK_BYTES else {_KEY: zlib.compress(plain)}


def unpack_answer(answer: dict[str, Any]) -> dict[str, Any]:
    """What `pack_answer` was given. Raises ValueError."""
    data = answer.get(_KEY)
    if not isinstance(data, bytes):
        return answer
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(data, _MOST_BYTES)
        found = msgpack.unpackb(plain) if reader.eof else None
    except (zlib.error, msgpack.UnpackException) as error:
        raise ValueError(f"the coordinator's answer cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ValueError("the coordinator's answer cannot be read")
    return found
