"""Typed reading of a `config.json`: every value is checked, and what is wrong is named."""

from collections.abc import Mapping
from dataclasses import dataclass

from geopetals.errors import CheckpointError

_LARGEST = 10**9


@dataclass(frozen=True, slots=True)
class Config:
    """The values of a model's config.json. Methods raise CheckpointError that names model and value."""

    name: str
    values: Mapping[str, object]

    def count(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that is given, a whole number of at least 1; null counts as not given."""
        given = self.count_if_given(*keys)
        if given is not None:
            return given
        if default is None:
            raise CheckpointError(f"{self.name} has no {keys[0]}: give the config.json of a language model.")
        return default

    def count_if_given(self, *keys: str) -> int | None:
        """As `count`, or None."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
                raise CheckpointError(
                    f"{self.name}: {key} is {_shown(value)}; it must be a whole number from 1 to {_LARGEST}."
                )
            return value
        return None

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.name}: {key} is {_shown(value)}; it must be true or false.")
        return value

    def text(self, *keys: str) -> str | None:
        """The first of `keys` that is given as text."""
        return next((value for key in keys if isinstance(value := self.values.get(key), str)), None)

    def refuse(self, reason: str) -> CheckpointError:
        """The error to raise about a model that cannot be described."""
        return CheckpointError(f"{self.name} {reason}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
