"""Telling in a line what differs between an answer and the expected one."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from geopetals.plan import Chain, Placement

RELATIVE = 1e-6
_ABSOLUTE_MS = 1e-6


def same(name: str, found: object, expected: object) -> Iterator[str]:
    """Equal, or one line; of sequences the first place where they differ."""
    if found == expected:
        return
    if isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            yield f"{name}: {len(found)} entries, expected {len(expected)}"
            return
        place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        differing = sum(a != b for a, b in zip(found, expected, strict=True))
        yield f"{name}[{place}]: {found[place]}, expected {expected[place]} ({differing} of {len(found)} differ)"
        return
    yield f"{name}: {found}, expected {expected}"


def close(name: str, found: float | Sequence[float], expected: float | Sequence[float]) -> Iterator[str]:
    """Equal to RELATIVE, or one line with the largest difference."""
    here, there = np.atleast_1d(np.asarray(found, dtype=float)), np.atleast_1d(np.asarray(expected, dtype=float))
    if here.shape != there.shape:
        yield f"{name}: {here.size} entries, expected {there.size}"
        return
    wrong = ~(np.abs(here - there) <= RELATIVE * np.abs(there) + _ABSOLUTE_MS)
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        index = f"[{place}]" if here.size > 1 else ""
        yield f"{name}{index}: {here[place]!r}, expected {there[place]!r} ({int(wrong.sum())} of {here.size} differ)"


def same_placement(name: str, found: Placement, expected: dict[str, Any]) -> Iterator[str]:
    """First blocks a from 1, and counts m; the a of a server without blocks says nothing."""
    held = found.held
    yield from same(f"{name}.m", held.tolist(), list(expected["m"]))
    starts = [int(start) + 1 if count else None for start, count in zip(found.starts, held, strict=True)]
    wanted = [start if count else None for start, count in zip(expected["a"], expected["m"], strict=True)]
    yield from same(f"{name}.a", starts, wanted)


def from_one(servers: Sequence[int]) -> list[int]:
    return [server + 1 for server in servers]


def names(chains: Sequence[Chain]) -> list[list[int]]:
    return [from_one(chain.servers) for chain in chains]
