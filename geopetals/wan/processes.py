"""Finds the processes that live in network namespaces, and ends them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from geopetals.wan.errors import WanFailure

GRACE_S = 2.0
_KILL_S = 10.0
_POLL_S = 0.01

Identity = tuple[int, int]


def end_all(namespaces: Collection[Identity], *, grace_s: float = GRACE_S) -> int:
    """SIGTERM, then SIGKILL to whoever is in these namespaces, until nobody is; tell how many there were.

    The namespaces must be held open, or the kernel might use their numbers again. Who is in the network of this process
    or of the machine is left alone, whatever the namespaces say. Raises WanFailure if some cannot be killed.
    """
    namespaces = _others(namespaces)
    ended: set[int] = set()
    started = time.monotonic()
    while True:
        found = list(living_in(namespaces))
        if not found:
            return len(ended)
        waited_s = time.monotonic() - started
        if waited_s > grace_s + _KILL_S:
            raise WanFailure(f"these processes cannot be killed: {', '.join(map(str, found))}; end them by hand.")
        for pid in found:
            if waited_s > grace_s or pid not in ended:
                _signal(pid, namespaces, signal.SIGKILL if waited_s > grace_s else signal.SIGTERM)
        ended.update(found)
        time.sleep(_POLL_S)


def living_in(namespaces: Collection[Identity]) -> Iterator[int]:
    """Process ids, this one left out; zombies are in no namespace."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid() and _namespace(int(entry.name)) in namespaces:
            yield int(entry.name)


@contextlib.contextmanager
def still_theirs(cookies: Mapping[Identity, int]) -> Iterator[set[Identity]]:
    """Those of these numbers that nobody has been given since: namespaces are known by their cookies for good.

    Inside they are held open. That of this process and that of the machine are never among them.
    """
    wanted = _others(cookies)
    with contextlib.ExitStack() as held:
        files: dict[Identity, int] = {}
        for pid in living_in(wanted):
            if (opened := _open_namespace(pid)) is None:
                continue
            identity, file = opened
            if identity in wanted and identity not in files:
                files[identity] = file
                held.callback(os.close, file)
            else:
                os.close(file)
        found = _cookies(list(files.values()))
        yield {identity for identity, cookie in zip(files, found, strict=False) if cookies[identity] == cookie}


def _open_namespace(pid: int) -> tuple[Identity, int] | None:
    try:
        file = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # ended meanwhile, or another user's
    return _identity(os.fstat(file)), file


def _cookies(files: Sequence[int]) -> list[int]:
    """Of namespaces that are open files; 0 if unknown."""
    if not files:
        return []
    helper = Path(__file__).with_name("netns_cookie.py")
    command = [sys.executable, "-I", "-S", str(helper), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, pass_fds=files)
    return [int(word) for word in done.stdout.split()]


def _others(namespaces: Collection[Identity]) -> set[Identity]:
    return set(namespaces) - _spared()


def _spared() -> set[Identity]:
    """The networks of this process and of the machine: no emulated host."""
    return {identity for pid in (os.getpid(), 1) if (identity := _namespace(pid)) is not None}


def _namespace(pid: int) -> Identity | None:
    try:
        return _identity(os.stat(f"/proc/{pid}/ns/net"))  # noqa: PTH116
    except OSError:
        return None  # ended meanwhile, or another user's


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _signal(pid: int, namespaces: Collection[Identity], number: signal.Signals) -> None:
    """To this very process: its id is looked at again once it cannot be given to another."""
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            if _namespace(pid) in namespaces:
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)
