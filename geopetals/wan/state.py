"""The directory by which a network is known: who runs it, and what a dead run has left.

A lock on a file in it is held as long as the router lives; it is free once the router is gone, however it ended.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geopetals.wan import control, processes
from geopetals.wan.control import SOCKET
from geopetals.wan.errors import WanError, WanFailure
from geopetals.wan.spec import WanSpec

DEFAULT_NAME = "wan"
LOG = "log"
_SPEC, _STATE, _LOCK = "spec.json", "state.json", "lock"
_FILES = (_SPEC, _STATE, SOCKET, LOG, _LOCK)
_POLL_S = 0.01


def named_directory(name: str) -> Path:
    """Where a network of this name is kept: `$XDG_RUNTIME_DIR/geopetals-wan`, else a directory for temporary files."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,59}", name):
        raise WanError(f"{name[:80]!r} is no name of a network: use letters, digits, '.', '-' and '_'.")
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute() and runtime.is_dir():
        return runtime / "geopetals-wan" / name
    return Path(tempfile.gettempdir()) / f"geopetals-wan-{os.getuid()}" / name


class StateDirectory:
    """Its files, and the lock. Whatever reads them raises WanError where others could have put something into them."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def make(self) -> None:
        """Raises WanError if it cannot be made, or belongs to somebody else."""
        try:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            if self.path.parent.name.startswith("geopetals-wan"):
                _check(self.path.parent)
            self.path.mkdir(mode=0o700, exist_ok=True)
            _check(self.path)
        except OSError as error:
            raise WanError(f"{self.path} cannot be used ({error.strerror}): choose another with --state.") from error

    def exists(self) -> bool:
        """Raises WanError if it is another user's."""
        try:
            _check(self.path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise WanError(f"the network in {self.path} is another user's: run this as that user.") from error
        return True

    def lock(self) -> int | None:
        """The lock as an open file, to be closed or left to the router; None while somebody else has it."""
        while True:
            try:
                _check(self.path)
                file = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                self.make()  # the last one to use it has removed it
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(file, self.path / _LOCK):
                    return file
            except BlockingIOError:
                os.close(file)
                return None
            os.close(file)

    def write_spec(self, spec: WanSpec) -> None:
        (self.path / _SPEC).write_text(json.dumps(spec.to_value()))

    def spec(self) -> WanSpec:
        _check(self.path)
        return WanSpec.from_value(json.loads((self.path / _SPEC).read_text()))

    def write_state(self, state: Mapping[str, Any]) -> None:
        """At once or not at all."""
        unfinished = self.path / f"{_STATE}.new"
        unfinished.write_text(json.dumps(state))
        unfinished.rename(self.path / _STATE)

    def state(self) -> dict[str, Any] | None:
        """What the router wrote when it was ready."""
        try:
            _check(self.path)
            found: dict[str, Any] = json.loads((self.path / _STATE).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise WanError(f"{self.path / _STATE} cannot be read ({error}): is it another user's?") from error
        return found

    def clean(self) -> int:
        """End what a dead router's namespaces still hold and remove the files; only for who has the lock."""
        state = self.state()
        ended = 0
        if state is not None:
            cookies = {tuple(host["namespace"]): host["cookie"] for host in state["hosts"].values()}
            with processes.still_theirs(cookies) as left:
                ended = processes.end_all(left)
        for name in (*_FILES, f"{_STATE}.new"):
            if name != _LOCK:
                (self.path / name).unlink(missing_ok=True)
        return ended

    def remove(self) -> None:
        """The rest, and directories that are empty then; only for who has the lock."""
        (self.path / _LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
            if self.path.parent.name.startswith("geopetals-wan"):
                self.path.parent.rmdir()

    def lock_when_free(self, timeout_s: float) -> int:
        """Wait for the router's end; past the deadline kill it. Raises WanFailure if that does not help."""
        deadline = time.monotonic() + timeout_s
        killed = False
        while (file := self.lock()) is None:
            if time.monotonic() > deadline:
                if killed:
                    raise WanFailure(f"the router of {self.path} does not end: see {self.path / LOG}.")
                killed = self._kill_router()
                deadline = time.monotonic() + 5.0
            time.sleep(_POLL_S)
        return file

    def _kill_router(self) -> bool:
        state = self.state()
        if state is not None:
            with contextlib.suppress(OSError):
                handle = os.pidfd_open(state["pid"])
                try:
                    if start_time(state["pid"]) == state["start_time"]:
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        return True


def start_time(pid: int) -> int:
    """When a process started, in ticks since the machine did: tells it from a later one of the same id."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _check(directory: Path) -> None:
    os.close(control.open_trusted(directory))
