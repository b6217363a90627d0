"""A command on a terminal, as a person at a keyboard has it."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from tests.live.commands import Workspace


class Terminal:
    """`geopetals ARGUMENTS` on a pseudo-terminal of its own; Ctrl-C goes through the terminal's line discipline."""

    def __init__(self, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
        self.workspace = Workspace()
        self.screen = ""
        self.chunks: list[str] = []
        self._master, slave = pty.openpty()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _TAKE_TERMINAL, sys.executable, "-m", "geopetals", *map(str, arguments)],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env={**os.environ, "TERM": "dumb", **self.workspace.environment(), **(env or {})},
                start_new_session=True,
            )
        finally:
            os.close(slave)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.workspace.destroy()
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Keys, also control characters: \\x03 is Ctrl-C, \\x04 the end of input."""
        os.write(self._master, text.encode())

    def read_until(self, text: str, *, timeout_s: float = 60) -> str:
        """What comes on the screen up to `text`, which is taken away with it."""
        deadline = time.monotonic() + timeout_s
        while text not in self.screen:
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"not within {timeout_s:.0f} s: {text!r}; the screen shows {self.screen!r}"
            assert self._read(left_s), f"ended without {text!r}; the screen shows {self.screen!r}"
        before, _, self.screen = self.screen.partition(text)
        return before

    def read_to_end(self, *, timeout_s: float = 60) -> str:
        deadline = time.monotonic() + timeout_s
        while self._read(deadline - time.monotonic()):
            assert time.monotonic() < deadline, f"does not end; the screen shows {self.screen!r}"
        return self.screen

    def _read(self, timeout_s: float) -> bool:
        """Wait for more; False at the end."""
        if not select.select([self._master], [], [], max(timeout_s, 0.0))[0]:
            return True
        try:
            data = os.read(self._master, 4096)
        except OSError:  # Linux: nobody has the other side open any more
            return False
        chunk = data.decode(errors="replace").replace("\r\n", "\n")
        self.chunks.append(chunk)
        self.screen += chunk
        return bool(data)


# The terminal must be the session's controlling one for Ctrl-C to become a signal.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
