"""Safetensors files, read without loading them: headers, hashes of tensors, samples.

The format: 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

import hashlib
import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from geopetals.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_CHUNK_BYTES = 1 << 22
_SAMPLE_BYTES = 4096
_SAMPLES = 3
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
}
_BITS |= {"F16": 16, "BF16": 16, "I16": 16, "U16": 16}


class Digest(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: bytes [begin, end) of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("F", "BF"))

    @property
    def elements(self) -> int:
        return (self.end - self.begin) * 8 // _BITS.get(self.dtype, 8)

    def describe_to(self, digest: Digest) -> None:
        digest.update(json.dumps([self.name, self.dtype, self.shape]).encode())


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name. Raises CheckpointError if the file is absent, cut short or not safetensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise CheckpointError(f"{path} is a Git LFS pointer and not the weights; run git lfs pull beside it.")
            if len(prefix) < 8 or length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is not a safetensors file ({size} bytes); download it again.")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); download it again.") from error
    if len(raw) < length:
        raise CheckpointError(f"{path} is cut short: its header alone needs {8 + length} bytes, {size} are present; "
                              "download it again.")  # fmt: skip
    entries = _parse_header(path, raw, offset=8 + length)
    expected = max((entry.end for entry in entries.values()), default=8 + length)
    if size != expected:
        word = "cut short" if size < expected else "damaged"
        raise CheckpointError(
            f"{path} is {word}: {expected} bytes are expected, {size} are present; download it again."
        )
    return entries


def _parse_header(path: Path, raw: bytes, *, offset: int) -> dict[str, TensorEntry]:
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        return {name: _parse_entry(name, info, offset) for name, info in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header; download it again.") from error


def _parse_entry(name: str, info: Mapping[str, object], offset: int) -> TensorEntry:
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise TypeError(name)
    begin, end = (int(value) for value in offsets)
    if not 0 <= begin <= end:
        raise ValueError(name)
    return TensorEntry(
        name=name, dtype=dtype, shape=tuple(int(n) for n in shape), begin=begin + offset, end=end + offset
    )


def hash_tensors(located: Iterable[tuple[Path, TensorEntry]]) -> str:
    """sha256 in hex over names, dtypes, shapes and all bytes, by name: how the tensors are sharded does not matter."""
    digest = hashlib.sha256()
    for path, entry in sorted(located, key=lambda pair: pair[1].name):
        entry.describe_to(digest)
        _feed(digest, path, [(entry.begin, entry.end)])
    return digest.hexdigest()


def sample_tensors(located: Iterable[tuple[Path, TensorEntry]]) -> str:
    """sha256 in hex over names, dtypes, shapes and 4 KiB from the start, the middle and the end of each tensor."""
    digest = hashlib.sha256()
    for path, entry in sorted(located, key=lambda pair: pair[1].name):
        entry.describe_to(digest)
        _feed(digest, path, _sample_ranges(entry))
    return digest.hexdigest()


def _sample_ranges(entry: TensorEntry) -> list[tuple[int, int]]:
    spare = entry.end - entry.begin - _SAMPLE_BYTES
    if spare <= 0:
        return [(entry.begin, entry.end)]
    starts = [entry.begin + spare * step // (_SAMPLES - 1) for step in range(_SAMPLES)]
    return [(start, start + _SAMPLE_BYTES) for start in starts]


def _feed(digest: Digest, path: Path, ranges: list[tuple[int, int]]) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for begin, end in ranges:
            for start in range(begin, end, _CHUNK_BYTES):
                digest.update(data[start : min(end, start + _CHUNK_BYTES)])
