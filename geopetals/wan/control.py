"""How commands speak to a network's router: one JSON request and one reply over a socket in the state directory.

A socket of whole messages: neither side ever waits for the rest of one. `enter` is answered with open files too.
"""

import array
import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from geopetals.errors import GeoPetalsError
from geopetals.wan import enter
from geopetals.wan.errors import WanError, WanFailure

SOCKET = "control"
LARGEST = 1 << 17
_TIMEOUT_S = 10.0


def listen(directory: Path) -> socket.socket:
    """The router's end, which only this user can connect to."""
    server = _socket()
    with _short_path(directory) as path:
        server.bind(path)
    server.listen(64)
    server.setblocking(False)
    return server


def request(directory: Path, message: Mapping[str, Any]) -> Any:
    """The router's answer. Raises WanFailure if it does not answer, WanError if it refuses or is another user's."""
    with _socket() as client:
        client.settimeout(_TIMEOUT_S)
        try:
            with _short_path(directory) as path:
                client.connect(path)
            client.sendall(json.dumps(message).encode())
            data = client.recv(4 * LARGEST)
        except TimeoutError as error:
            raise WanFailure(
                f"the network's router does not answer: see {directory / 'log'}, or take it down."
            ) from error
        except OSError as error:
            raise unreachable(directory, error) from error
    if not data:
        raise WanFailure("the network's router ended before it answered: take it down and start it again.")
    reply = json.loads(data)
    if "error" in reply:
        raise WanError(reply["error"])
    return reply["ok"]


def open_trusted(directory: Path) -> int:
    """As an open file. Raises OSError if there is none, WanError if others could have put something into it."""
    try:
        return enter.open_trusted(str(directory))
    except LookupError as error:
        raise WanError(str(error.args[0])) from error


def unreachable(directory: Path, error: OSError) -> GeoPetalsError:
    """Why nobody answers there."""
    if isinstance(error, PermissionError):
        return WanError(f"the network in {directory} is another user's: run this as that user.")
    if (directory / "state.json").exists():
        return WanFailure(f"the router of the network in {directory} is gone: take it down and start it again.")
    return WanFailure(f"no network runs in {directory}: start one with `geopetals wan up`.")


def answer(connection: socket.socket, reply: Mapping[str, Any], files: list[int]) -> None:
    """Send what `request` returns; a peer that does not take it at once goes without."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * LARGEST)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    with contextlib.suppress(OSError):
        connection.sendmsg([json.dumps(reply).encode()], rights)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@contextlib.contextmanager
def _short_path(directory: Path) -> Iterator[str]:
    """Paths of sockets have 108 bytes at most, directories have not."""
    handle = open_trusted(directory)
    try:
        yield f"/proc/self/fd/{handle}/{SOCKET}"
    finally:
        os.close(handle)
