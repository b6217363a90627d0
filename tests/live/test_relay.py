"""Servers behind NAT, reached through relays: the same tokens whatever relay fails, and when the first peer does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.live.relayed_swarm import NEW_TOKENS, PROMPT, RTT_S, RelayedSwarm
from tests.live.wan_programs import why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.live, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def swarm(llama: Path) -> Iterator[RelayedSwarm]:
    """Blocks 0:3 on two public hosts; 3:6 on a host behind a NAT that keeps ports, and on one behind another."""
    with RelayedSwarm(llama) as swarm:
        swarm.serve("first", "0:3")
        swarm.wait_served("first")
        swarm.relay("relay")
        swarm.relay("spare")
        swarm.serve("kept", "3:6")
        swarm.serve("changed", "3:6")
        swarm.serve("second", "0:3")
        for host in ("kept", "changed", "second"):
            swarm.wait_served(host)
        yield swarm


@pytest.fixture(scope="module")
def expected(local: Any) -> list[int]:
    """What the local model says."""
    torch.manual_seed(7)
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 1.5}
    found: list[int] = local.generate(ids, attention_mask=torch.ones_like(ids), top_k=0, **options)[0].tolist()
    return found


@pytest.mark.parametrize("host", ["kept", "changed"])
def test_a_server_behind_nat_serves_through_a_relay(swarm: RelayedSwarm, expected: list[int], host: str) -> None:
    found = swarm.generate("first", host).facts()
    first, behind = swarm.peers["first"], swarm.peers[host]
    assert found["tokens"] == expected
    assert found["route"] == [first, behind]
    assert found["using_relay"] == {first: False, behind: True}
    assert found["relayed"] == {first: False, behind: True}
    assert found["rtt_s"][behind] >= 2 * RTT_S
    assert RTT_S <= found["rtt_s"][first] < found["rtt_s"][behind]


def test_a_relay_that_is_killed_is_replaced_by_the_other(swarm: RelayedSwarm, expected: list[int]) -> None:
    session = swarm.generate("first", "kept", pause=True)
    session.facts()
    swarm.relays["relay"].kill()
    session.go_on()
    assert session.facts()["tokens"] == expected


def test_a_relay_that_falls_silent_is_left(swarm: RelayedSwarm, expected: list[int]) -> None:
    """Nothing resets its connections; libp2p alone would notice after 37 s."""
    swarm.relay("relay")
    session = swarm.generate("first", "changed", pause=True)
    session.facts()
    swarm.wan.cut("spare")
    session.go_on()
    try:
        assert session.facts()["tokens"] == expected
    finally:
        swarm.wan.heal("spare")


def test_relays_that_were_all_away_are_used_again(swarm: RelayedSwarm, expected: list[int]) -> None:
    """libp2p alone would not come back to one for more than 100 s."""
    kept = swarm.servers["kept"]
    session = swarm.generate("first", "kept", pause=True)
    session.facts()
    lost = kept.text().count("no relay passes anything on")
    for relay in swarm.relays.values():
        relay.kill()
    swarm.relay("relay")
    kept.wait_line("(no relay passes anything on)", times=lost + 1)
    session.go_on()
    found = session.facts()
    assert found["tokens"] == expected
    assert found["relayed"][swarm.peers["kept"]]
    swarm.relay("spare")


def test_the_first_peer_is_killed(swarm: RelayedSwarm, expected: list[int]) -> None:
    session = swarm.generate("first", "second", "kept", "changed", pause=True)
    session.facts()
    swarm.servers["first"].kill()
    session.go_on()
    found = session.facts()
    assert found["tokens"] == expected
    assert found["route"][0] == swarm.peers["second"]
    newcomer = swarm.generate("second", "kept", "changed", join="kept")
    assert newcomer.facts()["tokens"] == expected


def test_a_session_outlives_its_circuit(swarm: RelayedSwarm, expected: list[int]) -> None:
    """At its limit a relay ends a circuit; another one is dialled, and the server computes again what it has lost."""
    kept = swarm.servers["kept"]
    served = kept.text().count("serving blocks")
    swarm.relays["spare"].kill()
    swarm.relay("relay", "--max-time", "6", join="second")
    kept.wait_line("(serving blocks)", times=served + 1)
    session = swarm.generate("second", "kept", join="kept", pause=True)
    session.facts()
    lost = kept.text().count("session.lost")
    kept.wait_line("(session.lost)", times=lost + 1)
    session.go_on()
    assert session.facts()["tokens"] == expected
