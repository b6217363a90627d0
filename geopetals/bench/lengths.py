"""How long prompts and answers are."""

import re
from dataclasses import dataclass

import numpy as np

from geopetals.errors import UnsupportedInput

_NUMBER = r"\d{1,7}"
_MOST = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """A distribution of token counts, cut to [low, high]. With `sigma` log-normal with that median, else uniform."""

    low: int
    high: int
    median: int | None = None
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= _MOST:
            raise UnsupportedInput(f"lengths from {self.low} to {self.high} make no sense: give 1 to {_MOST} tokens.")

    def draw(self, rng: np.random.Generator) -> int:
        if self.median is None:
            return int(rng.integers(self.low, self.high + 1))
        return int(np.clip(round(self.median * float(np.exp(self.sigma * rng.standard_normal()))), self.low, self.high))


def read_length(text: str) -> Length:
    """`128`, `64-256` (uniform), or `128~0.5:2048`: log-normal with this median, sigma and largest value."""
    if match := re.fullmatch(rf"({_NUMBER})", text):
        return Length(low=int(match[1]), high=int(match[1]))
    if match := re.fullmatch(rf"({_NUMBER})-({_NUMBER})", text):
        return Length(low=int(match[1]), high=int(match[2]))
    if match := re.fullmatch(rf"({_NUMBER})~(\d{{1,2}}(?:\.\d{{1,6}})?):({_NUMBER})", text):
        return Length(low=1, high=int(match[3]), median=int(match[1]), sigma=float(match[2]))
    raise UnsupportedInput(
        f"{text!r} is no length: write 128, 64-256 for a uniform one, or 128~0.5:2048 for a log-normal one with median "
        "128, sigma 0.5 and at most 2048 tokens."
    )
