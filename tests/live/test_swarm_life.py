"""A swarm's life on an emulated wide area network: it grows, changes, loses a server, and tells no secret."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.cluster_io import load_cluster
from geopetals.planning import plan
from geopetals.planning.methods import Budget
from geopetals.wan import Wan, WanSpec
from tests.live.commands import wait_for
from tests.live.emulated_swarm import (
    BLOCK_BYTES,
    READY_S,
    EmulatedSwarm,
    SessionsClient,
    Watch,
    by_name,
    emulated_swarm,
    is_settled,
)
from tests.live.forked import Forks
from tests.live.wan_programs import why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.live, pytest.mark.timeout(580)]

RTT_S = 0.02
PROMPT, NEW_TOKENS, PAUSE_AT = [5, 6, 7, 8, 9], 24, 8


def device(milliseconds: float, blocks: int) -> tuple[str, ...]:
    """Of an emulated server: time for each block and pass, and memory of so many blocks; its work takes two of them."""
    speed = f"weights={milliseconds}ms,fixed={milliseconds}ms,per_token=0.01ms"
    return "--emulate", speed, "--memory", str(blocks * BLOCK_BYTES)


GROWTH = {"slow": device(3.0, 5), "fair": device(2.0, 5), "good": device(1.0, 6)}
FAST = device(0.1, 20)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.fixture(scope="module")
def swarm(llama: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedSwarm]:
    hosts = ["coordinator", "client", *GROWTH, "fast"]
    folder = tmp_path_factory.mktemp("life")
    with Wan(WanSpec.uniform(hosts, rtt_s=RTT_S)) as wan, emulated_swarm(forks, llama, folder, wan) as started:
        yield started


@pytest.fixture(scope="module")
def expected(local: Any) -> list[int]:
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    found: list[int] = local.generate(torch.tensor([PROMPT]), **options)[0].tolist()
    return found


def adopted(status: dict[str, Any]) -> int:
    return sum(entry["what"] == "plan adopted" for entry in status["history"])


def serves(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda status: bool(by_name(status).get(name, {}).get("span")) and is_settled(status)


def is_without(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda status: by_name(status).get(name, {"state": "gone"})["state"] == "gone"


def test_it_grows_changes_and_loses_a_server_under_sessions_that_go_on(
    swarm: EmulatedSwarm, expected: list[int], tmp_path: Path
) -> None:
    watch = Watch(swarm)
    try:
        join(swarm, "slow")
        join(swarm, "fair")
        assert swarm.status()["covered"]
        client = swarm.client("client", min_backoff=0.05, max_retries=12, connect_timeout=10.0)
        running = client.start(PROMPT, NEW_TOKENS, pause_at=PAUSE_AT)
        client.wait(running, "paused")
        join(swarm, "good")
        client.go_on(running)
        assert client.wait(running, "done")["tokens"] == expected
        swarm.wait_status(is_settled, "the plan of three is carried out")
        assert_planned_alike(swarm, tmp_path)
        before = adopted(swarm.status())

        running = client.start(PROMPT, NEW_TOKENS, pause_at=PAUSE_AT)
        client.wait(running, "paused")
        swarm.serve("fast", *FAST)
        swarm.wait_status(serves("fast"), "the fast server is part of it")
        client.go_on(running)
        assert client.wait(running, "done")["tokens"] == expected
        assert adopted(swarm.status()) == before + 1

        running = on_server(swarm, client, "fast")
        assert watch.gaps == []
    finally:
        watch.stop()
    assert watch.looks > 20
    swarm.servers["fast"].kill()
    client.go_on(running)
    assert client.wait(running, "done")["tokens"] == expected
    swarm.wait_status(is_without("fast"), "its loss is noticed")
    swarm.wait_status(lambda status: status["covered"], "all blocks have a server again")
    assert client.wait(client.start(PROMPT, NEW_TOKENS), "done")["tokens"] == expected


def join(swarm: EmulatedSwarm, name: str) -> None:
    """With the token alone."""
    swarm.serve(name, *GROWTH[name])
    swarm.wait_status(serves(name), f"{name} serves")


def on_server(swarm: EmulatedSwarm, client: SessionsClient, name: str) -> str:
    """A session, held in the middle, whose chain has that server: sessions go there when its links are measured."""
    peer = by_name(swarm.status())[name]["peer"]

    def begin() -> str | None:
        running = client.start(PROMPT, NEW_TOKENS, pause_at=PAUSE_AT)
        if peer in client.wait(running, "paused")["route"]:
            return running
        client.go_on(running)
        client.wait(running, "done")
        return None

    found = wait_for(begin, timeout_s=READY_S, what=lambda: f"a chain with {name}: {json.dumps(swarm.status())}")
    assert found is not None
    return found


def assert_planned_alike(swarm: EmulatedSwarm, folder: Path) -> None:
    """The offline planner gives the same for the cluster that the coordinator has planned for."""
    found = swarm.get("/plan")
    file = folder / "cluster.json"
    file.write_text(json.dumps(found["cluster"]))
    report = plan(load_cluster(file), method="search", objective="push", budget=Budget(), bound=False)
    offline = {str(server.server): server.blocks for server in report.servers if server.blocks is not None}
    assert {peer: tuple(span) for peer, span in found["plan"]["proposal"].items()} == {
        peer: (span.start, span.end) for peer, span in offline.items()
    }


def test_no_secret_is_in_any_log_at_debug_level(swarm: EmulatedSwarm) -> None:
    """Tokens to paste stand in the coordinator's output, which is no log."""
    ledger = json.loads((swarm.state / "credentials.json").read_text())
    tokens = [*swarm.tokens.values(), *((swarm.state / f"{role}.token").read_text() for role in ("admin", "server"))]
    secrets = {*tokens, *ledger["keys"], (swarm.state / "identity").read_bytes().hex()}
    for program in swarm.programs:
        for line in program.out.splitlines():
            if '"ticket"' in line:
                ticket = bytes.fromhex(json.loads(line)["ticket"])
                assert ticket
                secrets |= {ticket.hex(), base64.b64encode(ticket).decode(), repr(ticket)[2:-1]}
    assert len(secrets) > 6
    logs = [program.err for program in swarm.programs]
    assert sum(" DEBUG geopetals" in log for log in logs) > 3
    for log in logs:
        assert not [secret[:12] for secret in secrets if secret[:48] in log]
