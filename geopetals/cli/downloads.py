"""What commands that print an answer say beside it: which files of the model they have to fetch first."""

import contextlib

from geopetals.progress import Advance, Console, Silent


class Downloads:
    """A Reporter on stderr that shows downloads and nothing else."""

    def __init__(self) -> None:
        self._console, self._silent = Console(), Silent()

    def line(self, text: str) -> None:
        return None

    def task(self, text: str, *, total: int, unit: str = "bytes") -> contextlib.AbstractContextManager[Advance]:
        shown = self._console if unit == "bytes" else self._silent
        return shown.task(text, total=total, unit=unit)
