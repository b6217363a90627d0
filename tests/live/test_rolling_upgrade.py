"""A swarm is upgraded member by member: a server one version behind the coordinator and the clients still serves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.coordinator import messages
from geopetals.swarm import ring_messages
from tests.live.emulated_swarm import EmulatedSwarm, by_name, emulated_swarm, network_if_possible
from tests.live.forked import Forks

pytestmark = [pytest.mark.live, pytest.mark.timeout(400)]

NEXT_CONTROL, NEXT_WIRE = messages.VERSION + 1, ring_messages.VERSION + 1
UPGRADED = {
    "geopetals.coordinator.messages:VERSION": NEXT_CONTROL,
    "geopetals.client.coordination:VERSION": NEXT_CONTROL,
    "geopetals.swarm.member:VERSION": NEXT_CONTROL,
    "geopetals.swarm.member:WIRE_VERSION": NEXT_WIRE,
    "geopetals.swarm.records:VERSION": NEXT_WIRE,
    "geopetals.swarm.ring_messages:VERSION": NEXT_WIRE,
    "geopetals.swarm.inference_service:VERSION": NEXT_WIRE,
    "geopetals.swarm.handler:VERSION": NEXT_WIRE,
    "geopetals.client.swarm:VERSION": NEXT_WIRE,
}
"""What has a version, in every module that knows it."""


@pytest.fixture
def swarm(llama: Path, tmp_path: Path) -> Iterator[EmulatedSwarm]:
    hosts = ["coordinator", "old", "new", "client"]
    with Forks() as forks, network_if_possible(hosts) as wan, emulated_swarm(forks, llama, tmp_path, wan) as swarm:
        yield swarm


def test_a_server_one_version_older_serves(swarm: EmulatedSwarm, local: Any) -> None:
    """Everybody begins with the old version; the coordinator is upgraded first, then a server, then clients."""
    swarm.serve("old", "--blocks", "0:3")
    swarm.wait_status(lambda status: by_name(status).get("old", {}).get("span"), "the old server serves")
    swarm.kill_coordinator()
    swarm.start_coordinator(UPGRADED)
    swarm.serve("new", "--blocks", "3:6", patches=UPGRADED)
    swarm.wait_status(lambda status: status["covered"], "both servers serve")
    prompt, tokens = [5, 6, 7, 8, 9], 12
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    expected = local.generate(torch.tensor([prompt]), **options)[0].tolist()
    for patches in ({}, UPGRADED):
        client = swarm.client("client", patches=patches)
        session = client.start(prompt, tokens, pause_at=4)
        route = client.wait(session, "paused")["route"]
        client.go_on(session)
        assert client.wait(session, "done")["tokens"] == expected
        servers = by_name(swarm.status())
        assert route == [servers["old"]["peer"], servers["new"]["peer"]]
