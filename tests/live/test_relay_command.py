"""`geopetals relay` as a person runs it, on loopback."""

import json
import signal
import socket

import pytest

from tests.live.commands import run
from tests.live.conftest import StartCommand

pytestmark = pytest.mark.live


def test_it_says_what_it_grants_and_leaves_nothing(start_command: StartCommand) -> None:
    words = ["--host", "127.0.0.1", "--port", "0", "--max-data", "5MB", "--max-time", "60", "--json"]
    command = start_command("relay", *words)
    found = json.loads(command.wait_line(r"^\{.*\}$")[0])
    limits = {"data_bytes": 5_000_000, "seconds": 60, "circuits_per_peer": 16, "peers": 128}
    assert limits.items() <= found["limits"].items()
    assert found["addresses"] == [f"/ip4/127.0.0.1/tcp/{found['addresses'][0].split('/')[4]}/p2p/{found['peer_id']}"]
    command.signal(signal.SIGTERM)
    assert command.wait() == 0
    command.assert_nothing_left()


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = run("relay", "--host", "127.0.0.1", "--port", str(port))
    assert command.process.returncode == 2
    assert f"port {port}" in command.err.text
    assert "Traceback" not in command.err.text
