"""Programs without their start-up time, on hosts of an emulated network or on this one.

One process imports everything, then forks for each program, which enters its host and calls a function. Run as a module
it reads one JSON object a line and answers each with the pid; `Forks` is its other end.
"""

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from geopetals.swarm.orphan_guard import die_with_parent
from geopetals.wan import Wan, enter
from tests.live.commands import is_alive, run_and_exit, wait_for

COMMAND = "geopetals.cli:main"
_START_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """`call`: module:function, which is given `arguments`. `host`: an emulated network's directory and a host of it.
    `patches`: attributes, as module:name, that have other values in this process.
    """

    call: str
    arguments: list[str]
    folder: str
    name: str
    host: list[str] | None = None
    patches: dict[str, Any] = field(default_factory=dict)


class Forked:
    """A running program, and what it has printed."""

    def __init__(self, pid: int, path: Path) -> None:
        self.pid, self._path = pid, path

    @property
    def out(self) -> str:
        return self._path.with_suffix(".out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._path.with_suffix(".err").read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return is_alive(self.pid)

    def printed(self) -> str:
        return f"\n{self._path.name} stdout: {self.out}\nstderr: {self.err[-6000:]}"

    def tell(self, line: str) -> None:
        """To its stdin."""
        with self._path.with_suffix(".in").open("w") as stream:
            stream.write(line + "\n")

    def wait_line(self, pattern: str, *, timeout_s: float = 120.0) -> re.Match[str]:
        """The first match in what it prints on stdout or stderr."""

        def search() -> re.Match[str] | None:
            was_running = self.is_running
            for text in (self.out, self.err):
                if match := re.search(pattern, text, re.MULTILINE):
                    return match
            assert was_running, f"ended without {pattern!r}: {self.printed()}"
            return None

        return wait_for(search, timeout_s=timeout_s, what=lambda: f"a line with {pattern!r}; there is {self.printed()}")

    def kill(self) -> None:
        """The process and what it started, as a machine that fails."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        wait_for(lambda: not self.is_running, timeout_s=20, what="the end of a killed process")

    def stop(self, *, timeout_s: float = 30.0) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        wait_for(lambda: not self.is_running, timeout_s=timeout_s, what=lambda: f"the end of {self.printed()}")


class Forks:
    """Use as a context manager: every program is gone when it is left."""

    def __init__(self) -> None:
        self._number = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="gpf-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.live.forked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(self.folder)},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # its children die with it
        self._process.communicate()
        self._temporary.cleanup()

    def start(
        self,
        *arguments: str | Path,
        call: str = COMMAND,
        host: str | None = None,
        wan: Wan | None = None,
        patches: dict[str, Any] | None = None,
    ) -> Forked:
        """`geopetals ARGUMENTS`, or another function."""
        self._number += 1
        path = self.folder / f"{self._number}-{host or 'here'}"
        os.mkfifo(path.with_suffix(".in"))
        request = _Request(
            call=call,
            arguments=list(map(str, arguments)),
            folder=str(self.folder),
            name=path.name,
            host=None if wan is None or host is None else [str(wan.directory.path), host],
            patches=patches or {},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(asdict(request)) + "\n")
            self._process.stdin.flush()
            pid = self._process.stdout.readline()
        assert pid, "the preloaded process has ended"
        return Forked(int(pid), path)


def _serve() -> None:
    import gc
    import logging

    from geopetals.cli import build_parser, logs

    logs.configure(build_parser().parse_args(["--log-level", "debug", "doctor"]))
    logging.getLogger().handlers.clear()  # each program configures its own
    import geopetals.cli.coordinator
    import geopetals.client.conversation
    import geopetals.coordinator.app
    import geopetals.swarm.coordinated_server
    import geopetals.swarm.server  # noqa: F401

    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the programs here
    parent = os.getpid()
    for line in sys.stdin:
        request = _Request(**json.loads(line))
        path = Path(request.folder) / request.name
        for ending in (".out", ".err"):
            path.with_suffix(ending).touch()
        pid = os.fork()
        if pid == 0:
            run_and_exit(partial(_run, request, path, parent))
        print(pid, flush=True)


def _run(request: _Request, path: Path, parent: int) -> int:
    die_with_parent(parent)
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, ending in enumerate((".in", ".out", ".err")):
        os.dup2(os.open(path.with_suffix(ending), os.O_RDWR | os.O_APPEND), number)
    if request.host is not None:
        enter.enter(enter.fetch(*request.host))
    for name, value in request.patches.items():
        module, _, attribute = name.partition(":")
        setattr(importlib.import_module(module), attribute, value)
    module, _, function = request.call.partition(":")
    code: int | None = getattr(importlib.import_module(module), function)(request.arguments)
    return code or 0


if __name__ == "__main__":
    _serve()
