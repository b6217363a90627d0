"""`geopetals` as a person runs it: a process of its own whose output is read line by line, and all that it started."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, NoReturn, TypeVar

import psutil

MARK = "GEOPETALS_TEST_COMMAND"
_POLL_S = 0.02
# torch and multiprocessing keep these for as long as they like.
_NOT_OURS = ("pymp-", "torchinductor_")

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], *, timeout_s: float, what: str | Callable[[], str]) -> Found:
    """The first true value of `condition`; fails when there is none within the deadline. `what` may tell what there
    is instead.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(_POLL_S)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie is dead, its parent only has not noticed yet."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def wait_gone(pids: set[int], *, timeout_s: float) -> None:
    wait_for(lambda: not any(map(is_alive, pids)), timeout_s=timeout_s, what=f"end of {describe(pids)}")


def describe(pids: set[int]) -> list[str]:
    found = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            found.append(f"{pid} {process.name()} {process.status()}")
        except psutil.NoSuchProcess:
            continue
    return found


def marked(value: str) -> set[int]:
    """Live processes that were started with this mark in their environment, orphans included."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == value and is_alive(process.pid):
                found.add(process.pid)
        except (psutil.Error, OSError):
            continue  # ended meanwhile, or another user's
    return found


def is_daemon(pid: int) -> bool:
    """Whether a process is a p2pd."""
    try:
        return psutil.Process(pid).name() == "p2pd"
    except psutil.NoSuchProcess:
        return False


class Workspace:
    """A temporary directory of one command's own, and the mark by which all its processes are found."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.temp_dir = Path(tempfile.mkdtemp())  # short: the paths of unix sockets have 108 characters at most

    def environment(self) -> dict[str, str]:
        return {MARK: self.mark, "TMPDIR": str(self.temp_dir)}

    def processes(self) -> set[int]:
        return marked(self.mark)

    def files(self) -> list[str]:
        """What the command left in its temporary directory."""
        return [path.name for path in self.temp_dir.iterdir() if not path.name.startswith(_NOT_OURS)]

    def destroy(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.processes(), timeout_s=10, what="end of killed processes")
        shutil.rmtree(self.temp_dir, ignore_errors=True)


class Output:
    """Lines of one stream, collected by a thread."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.lines: list[str] = []
        self._stream = io.TextIOWrapper(stream, encoding="utf-8", newline="\n")  # an answer may hold any character
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        with self._stream:
            self.lines.extend(self._stream)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def join(self) -> str:
        """All of it; returns when nobody holds the other end any more."""
        self._thread.join(10)
        assert not self._thread.is_alive(), "a process that was left behind holds the command's output open"
        return self.text


class Command:
    """A running `geopetals ARGUMENTS`, in a process group of its own as a shell would start it."""

    def __init__(self, *arguments: str | Path, env: Mapping[str, str] | None = None, stdin: str | None = None) -> None:
        self.workspace = Workspace()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "geopetals", *map(str, arguments)],
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **self.workspace.environment(), **(env or {})},
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.out, self.err = Output(self.process.stdout), Output(self.process.stderr)
        if self.process.stdin is not None:
            self.process.stdin.write((stdin or "").encode())
            self.process.stdin.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_line(self, pattern: str, *, timeout_s: float = 60) -> re.Match[str]:
        """The first match in a line that the command prints on stdout or stderr."""

        def search() -> re.Match[str] | None:
            ended = self.process.poll() is not None
            if ended:
                self.out.join()
                self.err.join()
            for line in [*self.out.lines, *self.err.lines]:
                if match := re.search(pattern, line):
                    return match
            assert not ended, f"ended with {self.process.returncode} without {pattern!r}: {self.printed()}"
            return None

        return wait_for(search, timeout_s=timeout_s, what=f"a line with {pattern!r}; there is {self.printed()}")

    def printed(self) -> str:
        return f"\nstdout: {self.out.text}\nstderr: {self.err.text}"

    def signal(self, number: int) -> None:
        """To the process alone, as `kill` does."""
        self.process.send_signal(number)

    def press_ctrl_c(self) -> None:
        """To the whole foreground process group, as a terminal does."""
        os.killpg(self.pid, signal.SIGINT)

    def wait(self, *, timeout_s: float = 60) -> int:
        """The exit code, with all output read."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"has not ended within {timeout_s:.0f} s: {self.printed()}") from None
        self.out.join()
        self.err.join()
        return code

    def daemons(self) -> set[int]:
        """Its p2pds."""
        return {pid for pid in self.workspace.processes() if is_daemon(pid)}

    def assert_nothing_left(self, *, timeout_s: float = 5) -> None:
        """No process and no temporary file."""
        wait_for(
            lambda: not self.workspace.processes(),
            timeout_s=timeout_s,
            what=f"end of {describe(self.workspace.processes())}",
        )
        assert self.workspace.files() == []

    def destroy(self) -> None:
        self.workspace.destroy()
        self.process.wait()
        self.out.join()
        self.err.join()


def run(
    *arguments: str | Path, env: Mapping[str, str] | None = None, stdin: str | None = None, timeout_s: float = 60
) -> Command:
    """A command that has ended by itself, with nothing left."""
    command = Command(*arguments, env=env, stdin=stdin)
    try:
        command.wait(timeout_s=timeout_s)
        command.assert_nothing_left()
    finally:
        command.destroy()
    return command


def run_and_exit(work: Callable[[], int | None]) -> NoReturn:
    """In a fork: do `work` and end the process with what it returns; never return into the parent's code."""
    code = 70
    try:
        code = work() or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - whatever it is ends here
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
