"""What is wrong with a description of a cluster, and where."""

import contextlib
from collections.abc import Iterator

from geopetals.errors import UnsupportedInput


class Called(str):
    """A step into a list by the name of the item, where its number is not that in the file."""


Step = str | int


class ClusterError(UnsupportedInput):
    """One sentence about the value at `path`, for example ("servers", 3, "memory")."""

    def __init__(self, path: tuple[Step, ...], sentence: str) -> None:
        self.path = path
        self.sentence = sentence
        where = shown_path(path)
        super().__init__(f"{where}: {sentence}" if where else sentence)

    def inside(self, *steps: Step) -> "ClusterError":
        """The same fault, seen from further out."""
        return ClusterError((*steps, *self.path), self.sentence)


@contextlib.contextmanager
def at(*path: Step) -> Iterator[None]:
    """Faults found inside are reported from `path`."""
    try:
        yield
    except ClusterError as error:
        raise error.inside(*path) from None


def shown_path(path: tuple[Step, ...]) -> str:
    """`servers[3].memory`."""
    shown = ""
    for step in path:
        shown += f"[{step}]" if isinstance(step, int | Called) else f".{step}" if shown else step
    return shown


def shown_value(value: object) -> str:
    """A value as it may stand in a sentence: short, and in one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
