import asyncio
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from geopetals.errors import NetworkError
from geopetals.swarm.network import Network, NetworkConfig, is_loopback, load_identity, new_identity, peer_id_of

UNKNOWN_PEER = "12D3KooWAkxmPQg8FgoTvy7Wi2hWbjBJYuFBQ1q2JX7oxEkXb4jD"


@asynccontextmanager
async def network(**options: Any) -> AsyncIterator[Network]:
    started = await Network.start(NetworkConfig(**options))
    try:
        yield started
    finally:
        await started.stop()


def refusal(**options: Any) -> str:
    async def start() -> None:
        async with network(**options):
            pass

    with pytest.raises(NetworkError) as caught:
        asyncio.run(start())
    return str(caught.value)


def folders() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("geopetals-p2pd-*"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_two_peers_find_each_other_and_leave_nothing_behind() -> None:
    async def scenario() -> list[int]:
        async with network() as first, network(initial_peers=await first.addresses(), client_only=True) as second:
            assert len(folders()) == 2
            peers = await second.p2p.list_peers()
            assert first.peer_id in {peer.peer_id.to_base58() for peer in peers}
            assert all(address.startswith("/ip4/127.0.0.1/tcp/") for address in await first.addresses())
            assert all(address.endswith(f"/p2p/{first.peer_id}") for address in await first.addresses())
            return [first.p2p.daemon_pid, second.p2p.daemon_pid]

    pids = asyncio.run(scenario())
    assert folders() == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_control_socket_is_private() -> None:
    async def scenario() -> None:
        async with network():
            (folder,) = folders()
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert stat.S_IMODE((folder / "identity").stat().st_mode) == 0o600

    asyncio.run(scenario())


def test_a_given_port_is_taken() -> None:
    port = free_port()

    async def scenario() -> tuple[str, ...]:
        async with network(port=port) as started:
            return await started.addresses()

    assert all(f"/tcp/{port}/" in address for address in asyncio.run(scenario()))


def test_a_public_address_is_announced_with_the_real_port() -> None:
    async def scenario() -> tuple[str, ...]:
        async with network(public_ip="203.0.113.7") as started:
            return await started.addresses()

    addresses = asyncio.run(scenario())
    assert any(address.startswith("/ip4/203.0.113.7/tcp/") for address in addresses)
    assert not any("/tcp/0/" in address for address in addresses)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port}" in refusal(port=port)
        assert "--port" in refusal(port=port)
    assert folders() == []


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    assert "203.0.113.7" in refusal(host="203.0.113.7")


def test_a_host_name_that_does_not_exist_is_one_sentence() -> None:
    assert "nowhere.invalid" in refusal(host="nowhere.invalid")


@pytest.mark.parametrize("client_only", [True, False])
def test_a_swarm_that_does_not_answer_is_named(client_only: bool) -> None:
    port = free_port()
    message = refusal(initial_peers=(f"/ip4/127.0.0.1/tcp/{port}/p2p/{UNKNOWN_PEER}",), client_only=client_only)
    assert message.startswith(f"cannot reach the swarm at /ip4/127.0.0.1/tcp/{port}:")
    assert folders() == []


@pytest.mark.parametrize("address", ["203.0.113.7:31330", "", "/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/1/p2p/nobody"])
def test_what_is_no_address_is_one_sentence(address: str) -> None:
    refusal(initial_peers=(address,), client_only=True)
    assert folders() == []


def test_another_peer_at_the_address_is_not_the_swarm() -> None:
    async def scenario() -> None:
        async with network() as first:
            (address, *_) = await first.addresses()
            stranger = address.replace(first.peer_id, UNKNOWN_PEER)
            with pytest.raises(NetworkError, match="cannot reach the swarm"):
                await Network.start(NetworkConfig(initial_peers=(stranger,), client_only=True))

    asyncio.run(scenario())


def test_an_identity_file_keeps_the_peer_id(tmp_path: Path) -> None:
    path = tmp_path / "key"

    async def peer_id() -> str:
        async with network(identity=load_identity(path)) as started:
            return started.peer_id

    first = asyncio.run(peer_id())
    assert asyncio.run(peer_id()) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert peer_id_of(first).to_base58() == first


def test_without_an_identity_every_start_is_a_new_peer() -> None:
    assert new_identity() != new_identity()


@pytest.mark.parametrize("content", [b"not a key", b"", b"-----BEGIN OPENSSH PRIVATE KEY-----\n"])
def test_another_file_is_no_identity(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(NetworkError, match="no identity file"):
        load_identity(path)
    assert path.read_bytes() == content


def test_a_key_of_the_wrong_length_is_no_identity(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(new_identity()[:-40])
    with pytest.raises(NetworkError, match="no identity file"):
        load_identity(path)


def test_a_well_formed_file_without_a_key_does_not_start() -> None:
    assert "p2pd did not start" in refusal(identity=bytes([0x08, 0x01, 0x12, 0x04]) + b"abcd")
    assert folders() == []


def test_an_identity_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "key", tmp_path):
        with pytest.raises(NetworkError, match="cannot use the identity file"):
            load_identity(path)


def test_folders_of_killed_processes_are_swept_and_no_others() -> None:
    temporary = Path(tempfile.gettempdir())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale, ours = temporary / f"geopetals-p2pd-{ended.pid}-x", temporary / f"geopetals-p2pd-{os.getpid()}-x"
    foreign = temporary / "geopetals-p2pd-notes"
    for folder in (stale, ours, foreign):
        folder.mkdir()
        (folder / "p2pd.sock").touch()

    async def scenario() -> None:
        async with network(client_only=True):
            assert not stale.exists()
            assert ours.exists()
            assert foreign.exists()

    try:
        asyncio.run(scenario())
    finally:
        for folder in (ours, foreign):
            (folder / "p2pd.sock").unlink()
            folder.rmdir()


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_is_recognised(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
    assert not is_loopback("example.org")
