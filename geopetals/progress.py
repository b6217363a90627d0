"""What long work tells the person who waits: one line per finished step, a bar where there is a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Protocol, TextIO

Advance = Callable[[int], None]


class Reporter(Protocol):
    """Where loading, converting and starting report to."""

    def line(self, text: str) -> None:
        """One finished step or fact."""

    def task(self, text: str, *, total: int, unit: str = "bytes") -> contextlib.AbstractContextManager[Advance]:
        """Work of a known size; the yielded function takes how much more is done."""


class Silent:
    """Reports nothing."""

    def line(self, text: str) -> None:
        return None

    @contextlib.contextmanager
    def task(self, text: str, *, total: int, unit: str = "bytes") -> Iterator[Advance]:
        yield lambda done: None


class Console:
    """Lines on `stream`; on a terminal also a bar for the task that runs."""

    def __init__(self, stream: TextIO | None = None, *, prefix: str = "") -> None:
        self._stream = stream or sys.stderr
        self._prefix = prefix

    def line(self, text: str) -> None:
        print(f"{self._prefix}{text}", file=self._stream, flush=True)

    @contextlib.contextmanager
    def task(self, text: str, *, total: int, unit: str = "bytes") -> Iterator[Advance]:
        if not self._stream.isatty():
            yield lambda done: None
            self.line(text)
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn())
        with Progress(*columns, console=RichConsole(file=self._stream), transient=True) as progress:
            handle = progress.add_task(text, total=total)
            yield lambda done: progress.advance(handle, done)
        self.line(text)
