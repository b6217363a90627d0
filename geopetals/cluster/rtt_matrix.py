"""Measured round-trip times between places, from a cluster file or from a CSV file."""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Self

from geopetals.cluster.errors import ClusterError, at
from geopetals.cluster.kinds import Amount, Files, Kind, Name, Schema, mapping
from geopetals.cluster.machines import PlaceId
from geopetals.cluster.quantities import DURATION
from geopetals.cluster.records import Entry, Record
from geopetals.errors import UnsupportedInput

NO_LINK = "none"
_TIME = Amount(DURATION, most=60.0)
_PLACE = Name()
Rtts = tuple[tuple[PlaceId, PlaceId, float], ...]


class _Rtts(Kind):
    """`PLACE: {PLACE: RTT}`, both ways alike unless both are given."""

    def read(self, value: object, files: Files) -> Rtts:
        found: dict[tuple[PlaceId, PlaceId], float] = {}
        for start, row in mapping(value, "table of RTTs").items():
            with at(start):
                _PLACE.check(start)
                for end, rtt in mapping(row, "row of RTTs: PLACE: RTT").items():
                    with at(end):
                        _PLACE.check(end)
                        found[PlaceId(start), PlaceId(end)] = math.inf if rtt == NO_LINK else _TIME.read(rtt, files)
        return tuple((start, end, rtt_s) for (start, end), rtt_s in found.items())

    def check(self, value: Any) -> None:
        if not value:
            raise ClusterError((), "there are no RTTs: write PLACE: {PLACE: 20 ms}.")
        for start, end, rtt_s in value:
            with at(start, end):
                if rtt_s != math.inf:
                    _TIME.check(rtt_s)

    def write(self, value: Rtts) -> Any:
        table: dict[str, dict[str, str]] = {}
        for start, end, rtt_s in value:
            table.setdefault(start, {})[end] = NO_LINK if rtt_s == math.inf else _TIME.write(rtt_s)
        return table

    def schema(self) -> Schema:
        rtt = {"oneOf": [{"const": NO_LINK}, _TIME.schema()]}
        row = {"type": "object", "additionalProperties": rtt}
        return {"type": "object", "minProperties": 1, "additionalProperties": row}


@dataclass(frozen=True, slots=True, kw_only=True)
class RttMatrix(Record):
    """RTT within a place (PLACE: {PLACE: …}) and between places; infinite where two cannot reach each other."""

    WHAT = "table of RTTs"

    rtts: Annotated[Rtts, Entry("rtt", _Rtts(), "RTT from place to place")]

    @property
    def places(self) -> tuple[PlaceId, ...]:
        """In the order in which they are named first."""
        return tuple(dict.fromkeys(place for start, end, _ in self.rtts for place in (start, end)))

    def seconds(self) -> dict[tuple[PlaceId, PlaceId], float]:
        """By pair of places, in both directions; pairs that are not given are absent."""
        given = {(start, end): rtt_s for start, end, rtt_s in self.rtts}
        return {(end, start): rtt_s for (start, end), rtt_s in given.items()} | given

    @classmethod
    def from_value(cls, value: object, files: Files) -> Self:
        rtts = _from_csv(value, files) if isinstance(value, str) else _Rtts().read(value, files)
        _Rtts().check(rtts)
        return cls(rtts=rtts)

    def to_value(self) -> Any:
        return _Rtts().write(self.rtts)

    @classmethod
    def schema(cls) -> Schema:
        return {"oneOf": [{"type": "string", "description": "path of a CSV file"}, _Rtts().schema()]}


def _from_csv(path: str, files: Files) -> Rtts:
    """First row: the unit, then places; each further row a place, then RTTs; an empty cell is not known."""
    try:
        rows = [row for row in csv.reader(io.StringIO(files.text(path)), strict=True) if any(map(str.strip, row))]
    except csv.Error as error:
        raise ClusterError((), f"{path} is no CSV ({error}): write a table with commas.") from error
    if len(rows) < 2 or len(rows[0]) < 2:
        raise ClusterError((), f"{path} has no table: write a unit and places in the first row, RTTs below.")
    unit, *places = map(str.strip, rows[0])
    return tuple(_cells(path, unit, places, rows[1:], files))


def _cells(
    path: str, unit: str, places: list[str], rows: list[list[str]], files: Files
) -> Iterator[tuple[PlaceId, PlaceId, float]]:
    if len(set(places)) < len(places):
        raise ClusterError((), f"{path} names a place twice in its first row: keep one of them.")
    seen = set()
    for number, row in enumerate(rows, 2):
        start, *cells = map(str.strip, row)
        if len(cells) != len(places):
            raise ClusterError(
                (), f"row {number} of {path} has {len(cells)} RTTs for {len(places)} places: complete it."
            )
        if start in seen:
            raise ClusterError((), f"row {number} of {path} is the second for {start!r}: keep one of them.")
        seen.add(start)
        for end, cell in zip(places, cells, strict=True):
            if cell:
                yield PlaceId(start), PlaceId(end), _cell(f"row {number} of {path}", cell, unit, files)


def _cell(where: str, cell: str, unit: str, files: Files) -> float:
    if cell == NO_LINK:
        return math.inf
    try:
        return float(_TIME.read(f"{cell} {unit}", files))
    except UnsupportedInput as error:
        raise ClusterError((), f"{where}: {error}") from error
