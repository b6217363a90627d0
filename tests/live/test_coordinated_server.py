"""Servers that join a coordinator with the token alone: they measure themselves, hold what they are told, and stay."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.live.commands import Command, wait_for
from tests.live.conftest import Connect
from tests.live.coordinated import READY_S, CoordinatedSwarm, coordinated

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

HALF = ("--memory", "700KB")
"""Room for three of the six blocks and some cache."""


@pytest.fixture(scope="module")
def swarm(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatedSwarm]:
    with coordinated(llama, tmp_path_factory.mktemp("coordinated")) as started:
        yield started


def span_of(server: Command) -> tuple[int, int] | None:
    """Of the blocks that it said last it serves."""
    found = re.findall(r"^serving blocks (\d+):(\d+)", server.out.text, re.MULTILINE)
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def loads(server: Command) -> int:
    return server.err.text.count(" loaded: ") + server.out.text.count(" loaded: ")


def spans_of(status: dict[str, Any]) -> set[tuple[int, int]]:
    """Of the servers that are ready."""
    return {tuple(server["span"]) for server in status["servers"] if server["state"] == "ready" and server["span"]}


@pytest.fixture(scope="module")
def servers(swarm: CoordinatedSwarm) -> list[Command]:
    started = [swarm.add_server(*HALF), swarm.add_server(*HALF)]
    for server in started:
        server.wait_line(r"^serving blocks", timeout_s=READY_S)
    return started


def test_the_token_alone_is_enough_to_share_the_model(
    swarm: CoordinatedSwarm, servers: list[Command], llama: Path, connect: Connect, local: Any
) -> None:
    ids = torch.arange(3, 9)[None]
    model = connect(llama, join=swarm.tokens["client"])
    found = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, local.generate(ids, max_new_tokens=6, do_sample=False))
    assert {span_of(server) for server in servers} == {(0, 3), (3, 6)}
    assert all("gp2" not in server.printed() for server in servers)
    swarm.wait_status(lambda status: spans_of(status) == {(0, 3), (3, 6)}, "both servers in the status")


def test_a_second_server_of_the_same_kind_need_not_measure_itself(
    swarm: CoordinatedSwarm, servers: list[Command]
) -> None:
    third = swarm.add_server(*HALF)
    third.wait_line(r"^registered", timeout_s=READY_S)
    assert "measuring" not in third.printed()
    third.signal(signal.SIGTERM)
    assert third.wait(timeout_s=15) == 0, third.printed()
    third.assert_nothing_left()


def test_a_coordinator_that_was_killed_finds_its_servers_again_and_nobody_reloads(
    swarm: CoordinatedSwarm, servers: list[Command]
) -> None:
    assert swarm.coordinator is not None
    before = [loads(server) for server in servers], [span_of(server) for server in servers]
    registered = [server.printed().count("registered:") for server in servers]
    swarm.coordinator.signal(signal.SIGKILL)
    swarm.coordinator.wait()
    for server in servers:
        server.wait_line("the coordinator does not answer .*: serving on without it", timeout_s=READY_S)
    swarm.start_coordinator()
    for server, times in zip(servers, registered, strict=True):
        wait_for(lambda: server.printed().count("registered:") > times, timeout_s=READY_S, what="registration")  # noqa: B023
    swarm.wait_status(lambda status: spans_of(status) == {(0, 3), (3, 6)}, "both servers in the status")
    assert ([loads(server) for server in servers], [span_of(server) for server in servers]) == before


def test_a_server_whose_p2pd_was_killed_comes_back_to_its_coordinator_with_its_blocks(
    swarm: CoordinatedSwarm, servers: list[Command]
) -> None:
    server = servers[0]
    times, before = server.printed().count("registered:"), loads(server)
    os.kill(server.daemons().pop(), signal.SIGKILL)
    wait_for(lambda: server.printed().count("registered:") > times, timeout_s=READY_S, what="registration")
    assert loads(server) == before
    swarm.wait_status(lambda status: spans_of(status) == {(0, 3), (3, 6)}, "both servers in the status")


def test_a_server_moves_where_it_is_needed(llama: Path, tmp_path: Path) -> None:
    """The first one takes the blocks that the second one is pinned to; then they are one too many there."""
    with coordinated(llama, tmp_path) as swarm:
        first = swarm.add_server(*HALF, wait=True)
        start, end = span_of(first) or (0, 0)
        assert end - start == 3
        pinned = swarm.add_server(*HALF, "--blocks", f"{start}:{end}", wait=True)
        missing = {(0, 3), (3, 6)} - {(start, end)}
        wait_for(lambda: span_of(first) in missing, timeout_s=READY_S, what=f"a move: {first.printed()}")
        assert span_of(pinned) == (start, end)
        assert f"leaving blocks {start}:{end}" in first.printed()
        swarm.wait_status(lambda status: spans_of(status) == {(0, 3), (3, 6)}, "both servers in the status")
