"""How many tokens prompts and answers have: distributions, as people write them down."""

import math
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np

from geopetals.cluster.errors import ClusterError
from geopetals.cluster.kinds import Choice, Files, Number, Schema, Whole
from geopetals.cluster.records import Entry, Record
from geopetals.problem import Ints

_MOST = 1_000_000
_TOKENS = Whole(most=_MOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths(Record):
    """`20`, `trace`, or a mapping: the same for all, uniform from least to most, or lognormal around a median.

    A lognormal length is rounded up, and cut off at `most` (that many in a lump, nothing is drawn again).
    """

    WHAT = "length"

    kind: Annotated[
        str, Entry("kind", Choice("constant", "uniform", "lognormal", "trace"), "the distribution of tokens")
    ]
    tokens: Annotated[int | None, Entry("tokens", _TOKENS, "of a constant length")] = None
    least: Annotated[int | None, Entry("least", _TOKENS, "the shortest of uniform lengths")] = None
    most: Annotated[int | None, Entry("most", _TOKENS, "the longest of uniform or lognormal lengths")] = None
    median: Annotated[int | None, Entry("median", _TOKENS, "of lognormal lengths")] = None
    sigma: Annotated[
        float | None, Entry("sigma", Number(least=0, most=5), "deviation of the logarithm of lognormal lengths")
    ] = None

    @classmethod
    def from_value(cls, value: object, files: Files) -> Self:
        if value == "trace":
            return cls(kind="trace")
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(kind="constant", tokens=value)
        return super(Lengths, cls).from_value(value, files)

    @classmethod
    def schema(cls) -> Schema:
        return {"oneOf": [_TOKENS.schema(), {"const": "trace"}, super(Lengths, cls).schema()]}

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        """(count,). Lengths of a trace are not drawn, see Sessions."""
        if self.kind == "uniform":
            return rng.integers(self.least or 1, self.most or 1, count, endpoint=True)
        if self.kind == "lognormal":
            drawn = np.exp(rng.normal(math.log(self.median or 1), self.sigma or 0.0, count))
            return np.minimum(np.ceil(drawn), self.most or _MOST).astype(np.int64)
        return np.full(count, self.tokens or 1, dtype=np.int64)

    def _check(self) -> None:
        needed = {
            "constant": {"tokens"},
            "uniform": {"least", "most"},
            "lognormal": {"median", "sigma", "most"},
            "trace": set[str](),
        }[self.kind]
        for key in ("tokens", "least", "most", "median", "sigma"):
            given = getattr(self, key) is not None
            if given != (key in needed):
                advice = f"leave {key} out" if given else f"give {key}"
                raise ClusterError((), f"a {self.kind} length {'has no' if given else 'needs'} {key}: {advice}.")
        if self.kind == "uniform" and (self.least or 0) > (self.most or 0):
            raise ClusterError(("least",), f"{self.least} is above most, {self.most}: write the smaller number.")
