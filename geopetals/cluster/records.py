"""Dataclasses that know how they are written in a cluster file: one declaration for reading, writing and the schema."""

import dataclasses
import difflib
from typing import Any, ClassVar, Self, get_type_hints

from geopetals.cluster.errors import ClusterError, at, shown_value
from geopetals.cluster.kinds import Files, Kind, Schema, Whole, listing, mapping

_COUNT = Whole(least=1, most=10_000)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What a field is called in a file, where it is left out if it has its default; its kind; what it means."""

    key: str
    kind: Kind
    about: str


Entries = tuple[tuple[dataclasses.Field[Any], Entry], ...]
_ENTRIES: dict[type, Entries] = {}


def _entries(cls: type) -> Entries:
    if cls not in _ENTRIES:
        hints = get_type_hints(cls, include_extras=True)
        _ENTRIES[cls] = tuple((field, hints[field.name].__metadata__[0]) for field in dataclasses.fields(cls))
    return _ENTRIES[cls]


class Record:
    """Base of the dataclasses of a cluster: one whose values break a rule cannot be constructed.

    Raises ClusterError with the key and the rule, in code as from a file.
    """

    __slots__ = ()
    WHAT: ClassVar[str]

    def __post_init__(self) -> None:
        for field, each in _entries(type(self)):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                with at(each.key):
                    each.kind.check(value)
        self._check()

    def _check(self) -> None:
        """Rules between fields."""

    @classmethod
    def from_value(cls, value: object, files: Files) -> Self:
        """From what YAML or JSON gives."""
        given = mapping(value, cls.WHAT)
        known = {each.key: (field, each) for field, each in _entries(cls)}
        for key in given:
            if key not in known:
                raise ClusterError((key,), _unknown(key, list(known), cls.WHAT))
        values = {}
        for key, (field, each) in known.items():
            if given.get(key) is not None:
                with at(key):
                    values[field.name] = each.kind.read(given[key], files)
            elif field.default is dataclasses.MISSING:
                raise ClusterError((), f"{cls.WHAT} has no {key!r}: add {key}, {each.about}.")
        return cls(**values)

    def to_value(self) -> Any:
        """What `from_value` reads as an equal record."""
        return {
            each.key: each.kind.write(value)
            for field, each in _entries(type(self))
            if (value := getattr(self, field.name)) != field.default
        }

    @classmethod
    def schema(cls) -> Schema:
        """JSON schema of what `from_value` takes."""
        entries = list(_entries(cls))
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {each.key: each.kind.schema() | {"description": each.about} for _, each in entries},
            "required": [each.key for field, each in entries if field.default is dataclasses.MISSING],
        }


class Nested(Kind):
    """Another record."""

    def __init__(self, record: type[Record]) -> None:
        self._record = record

    def read(self, value: object, files: Files) -> Record:
        return self._record.from_value(value, files)

    def check(self, value: Any) -> None:
        if not isinstance(value, self._record):
            raise ClusterError((), f"{shown_value(value)} is no {self._record.WHAT}: give a {self._record.__name__}.")

    def write(self, value: Record) -> Any:
        return value.to_value()

    def schema(self) -> Schema:
        return self._record.schema()


class Many(Kind):
    """A list of at least one record. `copies`: an item with `count: N` stands for N, named NAME-1 to NAME-N."""

    def __init__(self, record: type[Record], *, copies: bool = False) -> None:
        self._record, self._copies = record, copies

    def read(self, value: object, files: Files) -> tuple[Record, ...]:
        read: list[Record] = []
        for index, item in enumerate(listing(value, self._record.WHAT)):
            with at(index):
                read += [self._record.from_value(single, files) for single in self._singles(item)]
        return tuple(read)

    def _singles(self, item: object) -> list[object]:
        if not self._copies or not isinstance(item, dict) or "count" not in item:
            return [item]
        count = item["count"]
        with at("count"):
            _COUNT.check(count)
        rest = {key: value for key, value in item.items() if key != "count"}
        return [rest | {"name": f"{rest.get('name')}-{number}"} for number in range(1, count + 1)]

    def check(self, value: Any) -> None:
        if not isinstance(value, tuple) or not value or not all(isinstance(item, self._record) for item in value):
            raise ClusterError((), f"there is none: give at least one {self._record.WHAT}.")

    def write(self, value: tuple[Record, ...]) -> Any:
        return [item.to_value() for item in value]

    def schema(self) -> Schema:
        items = self._record.schema()
        if self._copies:
            items["properties"]["count"] = _COUNT.schema() | {
                "description": "how many such there are, named NAME-1, NAME-2, …"
            }
        return {"type": "array", "minItems": 1, "items": items}


def _unknown(key: str, known: list[str], what: str) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it may have {', '.join(known)}."
    return f"{what} has no such key: {hint}"
