"""The kinds of values in a cluster file: how each is read, checked, written, and described in the JSON schema."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from geopetals.cluster.errors import ClusterError, shown_value
from geopetals.cluster.quantities import Unit
from geopetals.models import ModelCard
from geopetals.topology import Topology

Schema = dict[str, Any]


class Files(Protocol):
    """What a cluster file may refer to. Methods raise an expected error that names the file or the model."""

    def card(self, model: str) -> ModelCard:
        """A built-in model, or that of a path or a repository."""

    def text(self, path: str) -> str:
        """The contents of a file next to the cluster file."""

    def topology(self, source: str) -> Topology:
        """A graph: `topohub:GROUP/NAME`, else the path of a .graph file."""

    def absolute(self, path: str) -> str:
        """The path for those who stand in another directory."""


class Kind(ABC):
    """`read` and `check` raise ClusterError with the path inside of the value."""

    @abstractmethod
    def read(self, value: object, files: Files) -> Any:
        """From what YAML or JSON gives; `check` comes after it."""

    @abstractmethod
    def check(self, value: Any) -> None:
        """Whether a value may stand in the dataclass."""

    @abstractmethod
    def write(self, value: Any) -> Any:
        """What `read` reads as the same value."""

    @abstractmethod
    def schema(self) -> Schema:
        """What an editor may offer and check."""


class Name(Kind):
    """How people call a server, a client or a place."""

    def read(self, value: object, files: Files) -> str:
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise ClusterError((), f"{value} is a number: put the name in quotes.")
        if not isinstance(value, str):
            raise ClusterError((), f"{shown_value(value)} is no name: write a word.")
        return value

    def check(self, value: Any) -> None:
        if not isinstance(value, str) or not value.isprintable() or not 0 < len(value.strip()) == len(value) <= 100:
            raise ClusterError((), f"{shown_value(value)} is no name: write up to 100 letters, no space at either end.")

    def write(self, value: str) -> str:
        return value

    def schema(self) -> Schema:
        return {"type": "string", "minLength": 1, "maxLength": 100}


class Choice(Kind):
    """One of a few words."""

    def __init__(self, *words: str) -> None:
        self._words = words

    def read(self, value: object, files: Files) -> Any:
        return value

    def check(self, value: Any) -> None:
        if value not in self._words:
            raise ClusterError((), f"{shown_value(value)} is not known: choose one of {', '.join(self._words)}.")

    def write(self, value: str) -> str:
        return value

    def schema(self) -> Schema:
        return {"enum": list(self._words)}


class Flag(Kind):
    """true or false."""

    def read(self, value: object, files: Files) -> Any:
        return value

    def check(self, value: Any) -> None:
        if not isinstance(value, bool):
            raise ClusterError((), f"{shown_value(value)} must be true or false.")

    def write(self, value: bool) -> bool:
        return value

    def schema(self) -> Schema:
        return {"type": "boolean"}


class Whole(Kind):
    """A whole number from `least` to `most`."""

    def __init__(self, *, least: int = 1, most: int = 10**12) -> None:
        self._least, self._most = least, most

    def read(self, value: object, files: Files) -> Any:
        return value

    def check(self, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not self._least <= value <= self._most:
            raise ClusterError(
                (), f"{shown_value(value)} must be a whole number of {self._least} to {self._most}, without a unit."
            )

    def write(self, value: int) -> int:
        return value

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self._least, "maximum": self._most}


class Number(Kind):
    """A number without a unit from `least` to `most`."""

    def __init__(self, *, least: float, most: float, positive: bool = False) -> None:
        self._least, self._most, self._positive = least, most, positive

    def read(self, value: object, files: Files) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def check(self, value: Any) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and self._least <= value <= self._most and (value > 0 or not self._positive)
        if not fits:
            least = "above 0" if self._positive else f"from {self._least:g}"
            raise ClusterError((), f"{shown_value(value)} must be a number {least} to {self._most:g}, without a unit.")

    def write(self, value: float) -> float:
        return value

    def schema(self) -> Schema:
        bound = "exclusiveMinimum" if self._positive else "minimum"
        return {"type": "number", bound: 0 if self._positive else self._least, "maximum": self._most}


class Amount(Kind):
    """A number with a unit, held in the base unit, from `least` to `most` (in the base unit); above 0 if `positive`."""

    def __init__(self, unit: Unit, *, positive: bool = False, least: float = 0, most: float) -> None:
        self._unit, self._positive, self._least, self._most = unit, positive, least, most

    def read(self, value: object, files: Files) -> float | int:
        amount = self._unit.parse(value)
        return int(amount) if self._unit.whole and math.isfinite(amount) else amount

    def check(self, value: Any) -> None:
        wanted = int if self._unit.whole else int | float
        if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value):
            raise ClusterError(
                (), f"{shown_value(value)} is no {self._unit.what}: give a number, for example {self._unit.example}."
            )
        if value < self._least or (self._positive and value == 0):
            least = "more than 0" if self._positive else f"at least {self._unit.format(self._least)}"
            raise ClusterError((), f"{self._unit.format(value)} must be {least}.")
        if value > self._most:
            raise ClusterError((), f"{self._unit.format(value)} is above {self._unit.format(self._most)}: write less.")

    def write(self, value: float) -> str:
        return self._unit.format(value)

    def schema(self) -> Schema:
        return {"type": "string", "pattern": self._unit.pattern(), "examples": [self._unit.example.strip('"')]}


class Blocks(Kind):
    """`START:END`, the half-open span of blocks [start, end)."""

    def read(self, value: object, files: Files) -> tuple[int, int]:
        match = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", value) if isinstance(value, str) else None
        if match is None:
            raise ClusterError(
                (), f"{shown_value(value)} is no span of blocks: write START:END, for example 0:10 for the first ten."
            )
        return int(match[1]), int(match[2])

    def check(self, value: Any) -> None:
        is_pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(end, int) for end in value)
        if not is_pair or not 0 <= value[0] < value[1]:
            raise ClusterError(
                (), f"{shown_value(value)} holds no block: END is not included, so it must be above START."
            )

    def write(self, value: tuple[int, int]) -> str:
        return f"{value[0]}:{value[1]}"

    def schema(self) -> Schema:
        return {"type": "string", "pattern": r"^\s*\d{1,6}\s*:\s*\d{1,6}\s*$", "examples": ["0:10"]}


def mapping(value: object, what: str) -> Mapping[str, object]:
    """Raises ClusterError unless the value is a mapping whose keys are words."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ClusterError((), f"{shown_value(value)} is no {what}: write `key: value` pairs.")
    return value


def listing(value: object, what: str) -> Sequence[object]:
    """Raises ClusterError unless the value is a list."""
    if not isinstance(value, list):
        raise ClusterError((), f"{shown_value(value)} is no list of {what}: start each with a dash.")
    return value
