"""What runs in the hosts of emulated networks, and how it is asked."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from geopetals.wan import Wan, WanError, WanSpec

PORT = 4711
AB = WanSpec.uniform(["a", "b"], rtt_s=0.05)

_ECHO = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("0.0.0.0", {port}))
    print("ready", flush=True)
    while True:
        data, peer = server.recvfrom(2048)
        server.sendto(repr(peer).encode(), peer)
"""

_ASK = """
import ast, socket, sys, time
count, timeout, *addresses = sys.argv[1:]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.bind(("0.0.0.0", 5555))
    client.settimeout(float(timeout))
    found = []
    for _ in range(int(count)):
        for address in addresses:
            began = time.monotonic()
            client.sendto(b"question", (address, {port}))
            try:
                data, peer = client.recvfrom(2048)
            except TimeoutError:
                continue
            found.append((peer[0], time.monotonic() - began, *ast.literal_eval(data.decode())))
print(found)
"""

STUBBORN = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""

Answer = tuple[str, float, str, int]
"""Who answered, after how many seconds, and from which address and port the question came to it."""


@contextmanager
def running(wan: Wan, host: str, program: str) -> Iterator["subprocess.Popen[str]"]:
    """A Python program that prints a line when it is ready."""
    with wan.popen(host, [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def echo(wan: Wan, host: str) -> AbstractContextManager["subprocess.Popen[str]"]:
    """Answers each datagram with the address that it came from."""
    return running(wan, host, _ECHO.format(port=PORT))


def ask(wan: Wan, host: str, *targets: str, count: int = 1, timeout_s: float = 10.0) -> list[Answer]:
    """What echoes answer, one question after the other, all from port 5555."""
    addresses = [wan.addresses[target] for target in targets]
    command = [sys.executable, "-c", _ASK.format(port=PORT), str(count), str(timeout_s), *addresses]
    done = wan.run(host, command, capture_output=True, text=True, check=True, timeout=60)
    found: list[Answer] = ast.literal_eval(done.stdout)
    return found


def why_not() -> str | None:
    """Why this machine has no emulated networks, as `geopetals wan up` says it."""
    try:
        with Wan(WanSpec.uniform(["a"], rtt_s=0)):
            return None
    except WanError as error:
        return str(error)


def run_up(state: Path, *arguments: str) -> str:
    """Its output; the router that it leaves running is ended by who called."""
    command = [sys.executable, "-m", "geopetals", "wan", "up", "--state", str(state), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
