"""Finds the processes that live in network namespaces, and ends them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from geopetals.wan.errors import WanFailure

GRACE_S = 2.0
_KILL_S = 10.0
_POLL_S = 0.01

Identity = tuple[int, int]


def end_all(namespaces: Collection[Identity], *, grace_s: float = GRACE_S) -> int:
    """SIGTERM, then SIGKILL to whoever is in these namespaces, until nobody is; tell how many there were.

    The namespaces must be held open, or the kernel might use their numbers again. Raises WanFailure if some cannot be
    killed.
    """
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


def still_theirs(cookies: Mapping[Identity, int]) -> set[Identity]:
    """Those of these numbers that nobody has been given since: namespaces are known by their cookies for good."""
    example = {identity: pid for pid in living_in(cookies) if (identity := _namespace(pid)) is not None}
    if not example:
        return set()
    helper = Path(__file__).with_name("netns_cookie.py")
    command = [sys.executable, "-I", "-S", str(helper), *map(str, example.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    found = [int(word) for word in done.stdout.split()]
    return {identity for identity, cookie in zip(example, found, strict=False) if cookies[identity] == cookie}


def _namespace(pid: int) -> Identity | None:
    try:
        status = os.stat(f"/proc/{pid}/ns/net")  # noqa: PTH116
    except OSError:
        return None  # ended meanwhile, or another user's
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
