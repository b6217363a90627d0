"""Numbers with units as people write them, exact in both directions: "24 GB", "35 ms", "100 Mbit/s", "2/min".

Reading multiplies decimals before it rounds to a float, so that "16.2488 ms" is the float nearest to 0.0162488; writing
chooses the unit that reads best among those that give back the very same float.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from geopetals.cluster.errors import ClusterError, shown_value

NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
_LONGEST = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A kind of quantity: its units, each with its worth in the base unit, the usual ones first."""

    what: str
    example: str
    worth: Mapping[str, Fraction]
    spellings: Mapping[str, str]
    """Other ways to write a unit."""
    whole: bool = False
    """Whether values are whole numbers of the base unit."""

    def parse(self, value: object) -> float:
        """The value in the base unit. Raises ClusterError, without a path, that says what to write."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            unit = next(iter(self.worth))
            raise ClusterError((), f"{value} has no unit: write it with one, for example {_joined(str(value), unit)}.")
        text = value if isinstance(value, str) and len(value) <= _LONGEST else ""
        match = re.fullmatch(rf"\s*({NUMBER})\s*(\D.*?)?\s*", text)
        if match is None:
            raise ClusterError(
                (), f"{shown_value(value)} is no {self.what}: write a number and a unit, for example {self.example}."
            )
        worth = self.worth[self._unit(match[2] or "", text)]
        amount = _to_float(Fraction(Decimal(match[1])) * worth)
        return float(round(amount)) if self.whole and math.isfinite(amount) else amount

    def format(self, value: float) -> str:
        """The text that `parse` reads as exactly this value."""
        texts = [_joined(_digits(Fraction(value) / worth), unit) for unit, worth in self.worth.items()]
        exact = [text for text in texts if self.parse(text) == value]
        base = next(unit for unit, worth in self.worth.items() if worth == 1)
        if value == 0:
            return _joined("0", next(iter(self.worth)))
        return min(exact, key=_readability, default=_joined(repr(value), base))

    def pattern(self) -> str:
        """A regular expression for JSON Schema."""
        units = "|".join(re.escape(unit) for unit in [*self.worth, *self.spellings])
        return rf"^\s*{NUMBER}\s*({units})\s*$"

    def _unit(self, text: str, value: str) -> str:
        unit = self.spellings.get(text, text)
        if unit in self.worth:
            return unit
        if not text:
            raise ClusterError((), f"{shown_value(value)} has no unit: write it with one, for example {self.example}.")
        near = [known for known in self.worth if known.lower() == text.lower()]
        hint = f"write {near[0]}" if near else f"use one of {', '.join(self.worth)}"
        raise ClusterError((), f"{shown_value(text)} is no unit of {self.what}: {hint}, for example {self.example}.")


def _to_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _digits(value: Fraction) -> str:
    number = float(value)
    return format(Decimal(repr(number)).normalize(), "f") if 1e-6 <= abs(number) < 1e16 else repr(number)


def _joined(number: str, unit: str) -> str:
    return f"{number}{unit}" if unit.startswith("/") else f"{number} {unit}"


def _readability(text: str) -> tuple[bool, int]:
    """Prefer numbers from 1 to 1000, then short ones."""
    match = re.match(NUMBER, text)
    number = abs(float(match[0])) if match else 0.0
    return not (number == 0 or 1 <= number < 1000), len(text)


def _decimal(*names: str, start: int = 0) -> dict[str, Fraction]:
    return {name: Fraction(1000) ** (start + step) for step, name in enumerate(names)}


MEMORY = Unit(
    what="amount of memory",
    example='"24 GB"',
    worth={"GB": Fraction(1000**3)}
    | _decimal("B", "kB", "MB", "GB", "TB")
    | {f"{prefix}iB": Fraction(1024) ** power for power, prefix in enumerate("KMGT", 1)},
    spellings={"KB": "kB"},
    whole=True,
)
DURATION = Unit(
    what="time",
    example='"35 ms"',
    worth={"ms": Fraction(1, 1000), "s": Fraction(1), "us": Fraction(1, 10**6), "min": Fraction(60)},
    spellings={"\N{MICRO SIGN}s": "us", "\N{GREEK SMALL LETTER MU}s": "us"},
)
BANDWIDTH = Unit(
    what="bandwidth",
    example='"100 Mbit/s"',
    worth={"Mbit/s": Fraction(10**6)} | _decimal("bit/s", "kbit/s", "Mbit/s", "Gbit/s"),
    spellings={"bps": "bit/s", "kbps": "kbit/s", "Mbps": "Mbit/s", "Gbps": "Gbit/s"},
)
RATE = Unit(
    what="rate",
    example='"2/min"',
    worth={"/s": Fraction(1), "/min": Fraction(1, 60), "/h": Fraction(1, 3600), "/day": Fraction(1, 86400)},
    spellings={"/hour": "/h", "/d": "/day", "/minute": "/min", "/second": "/s"},
)
