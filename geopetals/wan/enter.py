"""Becomes a program in a host of an emulated network: `python -I -S enter.py STATE_DIRECTORY HOST PROGRAM [ARG ...]`.

The process stays the same one: signals, input, output and exit code are the program's own. It runs by its path, with
nothing but the standard library, so that it costs a few milliseconds; user namespaces take no process of two threads.
"""

import ctypes
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

NOT_EXECUTABLE, NOT_FOUND = 126, 127
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_TIMEOUT_S = 10.0


def main(arguments: Sequence[str]) -> int:
    directory, host, *command = arguments
    try:
        enter(fetch(directory, host))
    except (OSError, LookupError) as error:
        return _fail(f"{host!r} of the network in {directory} cannot be entered ({error}).", 1)
    return execute(command, os.environ)


def fetch(directory: str, host: str) -> list[int]:
    """The host's namespaces as open files, the user namespace first if there is one.

    Raises OSError if the router cannot be reached, LookupError with a sentence if it refuses or is not to be trusted.
    """
    handle = open_trusted(directory)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(_TIMEOUT_S)
        client.connect(f"/proc/self/fd/{handle}/control")
        client.sendall(json.dumps({"do": "enter", "host": host}).encode())
        data, files, *_ = socket.recv_fds(client, 1 << 16, 2)
    os.close(handle)
    if not files:
        raise LookupError(json.loads(data or b"{}").get("error", "the router ended"))
    return files


def open_trusted(directory: str) -> int:
    """A network's directory as an open file.

    Raises OSError if it cannot be opened, LookupError with a sentence if others could have put something into it.
    """
    parent = os.path.dirname(os.path.abspath(directory))  # noqa: PTH100, PTH120
    if os.path.basename(parent).startswith("geopetals-wan"):  # noqa: PTH119
        _check_owner(parent, os.lstat(parent))
    _check_owner(directory, os.lstat(directory))
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check_owner(directory, os.fstat(handle))
    except LookupError:
        os.close(handle)
        raise
    return handle


def _check_owner(directory: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise LookupError(f"{directory} is a symbolic link: name the directory itself with --state.")
    if status.st_uid != os.geteuid():
        raise LookupError(f"{directory} belongs to another user: run this as them, or choose another with --state.")
    if not stat.S_ISDIR(status.st_mode):
        raise LookupError(f"{directory} is no directory: choose another with --state.")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mend = "" if status.st_mode & stat.S_ISVTX else f"run `chmod 700 {directory}`, or "  # /tmp is meant to be so
        raise LookupError(f"others may write into {directory}: {mend}choose another with --state.")


def enter(files: Sequence[int]) -> None:
    """Move this process into namespaces and close the files. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    kinds = (_CLONE_NEWNET,) if len(files) == 1 else (_CLONE_NEWUSER, _CLONE_NEWNET)
    for file, kind in zip(files, kinds, strict=True):
        if libc.setns(file, kind):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        os.close(file)


def execute(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Never returns if the program can be started, else an exit code as shells give it."""
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and programs would inherit that
        signal.signal(ignored, signal.SIG_DFL)
    try:
        _execute(command, environment)
    except (FileNotFoundError, NotADirectoryError):
        return _fail(f"there is no program {command[0]!r}.", NOT_FOUND)
    except OSError as error:
        return _fail(f"{command[0]!r} cannot be started ({error.strerror}).", NOT_EXECUTABLE)


def _execute(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    os.execvpe(command[0], list(command), environment)


def _fail(sentence: str, code: int) -> int:
    print(f"geopetals: error: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
