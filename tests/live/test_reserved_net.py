"""Peers on a machine whose only address is a reserved one, which libp2p tells nobody of."""

import os
import shutil
import subprocess
import sys

import pytest

_WHERE = (
    *("unshare", "--map-root-user", "--net", "sh", "-c"),
    'ip link set lo up && ip addr add 192.0.2.7/24 dev lo && exec "$@"',
    "sh",
)
if not shutil.which("unshare") or subprocess.run([*_WHERE, "true"], capture_output=True).returncode:
    pytest.skip("needs the commands unshare and ip, and user namespaces", allow_module_level=True)

pytestmark = [pytest.mark.live, pytest.mark.timeout(120)]

_PROGRAM = """
import asyncio
from geopetals.swarm.circuits import links
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.relay_protocol import ping

async def reach(one, other):
    async with asyncio.timeout(40):
        while not await ping(one.p2p, other.peer_id, timeout_s=5):
            await asyncio.sleep(0.2)

async def main():
    first = await Network.start(NetworkConfig(host="0.0.0.0"))
    peers = tuple(address for address in await first.addresses() if "192.0.2.7" in address)
    servers = [await Network.start(NetworkConfig(host="0.0.0.0", initial_peers=peers)) for _ in range(2)]
    client = await Network.start(NetworkConfig(client_only=True, initial_peers=peers))
    before = set(await links(client.p2p))
    for server in servers:
        assert server.peer_id not in before, "libp2p knows it already: this shows nothing"
    for one, other in ((client, servers[0]), (client, servers[1]), (servers[1], servers[0])):
        await reach(one, other)
    for network in (client, *servers, first):
        await network.stop()
    print("reached")

asyncio.run(main())
"""


def test_servers_and_clients_reach_each_other() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*_WHERE, sys.executable, "-c", _PROGRAM], capture_output=True, text=True, env=environment, timeout=110
    )
    assert found.stdout.endswith("reached\n"), found.stderr
