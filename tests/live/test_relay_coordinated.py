"""A swarm with a coordinator in which a server stands behind NAT: it joins with the token alone."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.live.relayed_swarm import NEW_TOKENS, PROMPT, RelayedSwarm
from tests.live.wan_programs import why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def swarm(llama: Path) -> Iterator[RelayedSwarm]:
    """The coordinator is on `first`, blocks 0:3 on `second`, 3:6 behind NAT on `changed`; clients and servers have
    tokens of their roles, so has the relay.
    """
    with RelayedSwarm(llama) as swarm:
        state = swarm.folder / "state"
        words = ["--model", llama, "--state", state, "--host", swarm.wan.addresses["first"]]
        swarm.servers["first"] = coordinator = swarm.run("first", "coordinator", *words)
        swarm.tokens["server"] = coordinator.wait_line(r"geopetals serve --join (gp2\w+)")
        swarm.tokens["client"] = coordinator.wait_line(r"geopetals generate --join (gp2\w+)")
        swarm.tokens["relay"] = _token(state, "relay")
        relay = ["--host", swarm.wan.addresses["relay"], "--join", swarm.tokens["relay"]]
        swarm.relays["relay"] = swarm.run("relay", "relay", *relay)
        swarm.relays["relay"].wait_line("(relaying)")
        for host, span in (("second", "0:3"), ("changed", "3:6")):
            swarm.servers[host] = swarm.run(host, "serve", "--join", swarm.tokens["server"], "--blocks", span)
        for host in ("second", "changed"):
            swarm.servers[host].wait_line("(serving blocks)")
            swarm.peers[host] = swarm.servers[host].wait_line(r"(?m)^peer (\S+)$")
        yield swarm


def _token(state: Path, role: str) -> str:
    command = [sys.executable, "-m", "geopetals", "token", "create", "--state", str(state), "--role", role, "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    return str(found["token"])


def test_it_serves_also_while_the_coordinator_is_killed(swarm: RelayedSwarm, local: Any) -> None:
    session = swarm.ask(swarm.tokens["client"], None, pause=True)
    before = session.facts()
    behind = swarm.peers["changed"]
    assert before["route"] == [swarm.peers["second"], behind]
    assert before["relayed"] == {swarm.peers["second"]: False, behind: True}
    assert before["using_relay"][behind]
    swarm.servers["first"].kill()
    session.go_on()
    torch.manual_seed(7)
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 1.5}
    expected = local.generate(ids, attention_mask=torch.ones_like(ids), top_k=0, **options)[0].tolist()
    assert session.facts()["tokens"] == expected
