"""The coordinator's commands around a swarm that runs: what they show, what they order, what they refuse."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.planning.methods import Budget
from tests.live.commands import Command, run, wait_for
from tests.live.conftest import Connect
from tests.live.coordinated import READY_S, CoordinatedSwarm, coordinated

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def swarm(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatedSwarm]:
    """Two servers that hold half of the model each."""
    with coordinated(llama, tmp_path_factory.mktemp("coordinated")) as started:
        servers = [started.add_server("--memory", "700KB", "--name", f"s{number}") for number in range(2)]
        for server in servers:
            server.wait_line(r"^serving blocks", timeout_s=READY_S)
        started.wait_status(lambda status: status["covered"], "all blocks served")
        yield started


def ask(swarm: CoordinatedSwarm, *arguments: str) -> Any:
    """The JSON of a command that asks the coordinator of this state."""
    command = run(*arguments, "--json", "--state", swarm.folder / "state")
    assert command.process.returncode == 0, command.printed()
    return json.loads(command.out.text)


def test_a_token_alone_is_enough_to_generate_what_the_local_model_does(
    swarm: CoordinatedSwarm, connect: Connect, local: Any
) -> None:
    model = connect(join=swarm.tokens["client"])
    ids = torch.arange(5, 13)[None]
    assert torch.equal(
        model.generate(ids, max_new_tokens=12, do_sample=False), local.generate(ids, max_new_tokens=12, do_sample=False)
    )

    def closed(status: dict[str, Any]) -> bool:
        return bool(status["counts"]["closed"] == 1 and not status["sessions"])

    swarm.wait_status(closed, "the session is over")


def test_status_tells_the_same_by_every_way(swarm: CoordinatedSwarm) -> None:
    by_state = ask(swarm, "status")
    by_url = json.loads(run("status", "--json", "--url", swarm.url).out.text)
    for found in (by_state, by_url):
        assert {server["name"] for server in found["servers"]} == {"s0", "s1"}
        assert found["covered"] is True
        assert found["replicas"] == [1] * 6
    shown = run("status", "--url", swarm.url).out.text
    assert "all blocks served" in shown
    assert "0:3" in shown
    assert "3:6" in shown


def test_the_plan_is_what_geopetals_plan_gives_for_the_same_cluster(swarm: CoordinatedSwarm, tmp_path: Path) -> None:
    from geopetals.cluster_io import load_cluster
    from geopetals.planning import plan

    file = tmp_path / "cluster.json"
    found = ask(swarm, "plan", "--live", "--explain", "--save", str(file))
    assert found["plan"]["proposal"]
    assert any(entry["why"] for entry in found["history"])
    report = plan(load_cluster(file), method="search", objective="push", budget=Budget(), bound=False)
    again = {str(server.server): server.blocks for server in report.servers if server.blocks is not None}
    assert {peer: tuple(span) for peer, span in found["plan"]["proposal"].items()} == {
        peer: (span.start, span.end) for peer, span in again.items()
    }


def test_a_plan_that_is_asked_for_is_made_and_explained(swarm: CoordinatedSwarm) -> None:
    before = swarm.status()["plan"].get("number", 0)
    assert ask(swarm, "replan", "--reason", "the test wants one") == {"asked": True}
    swarm.wait_status(lambda status: status["plan"].get("number", 0) > before, "another plan")
    assert "the test wants one" in swarm.status()["plan"]["reason"]
    assert "the test wants one" in run("plan", "--live", "--explain", "--url", swarm.url).out.text


def test_the_state_can_be_copied_while_it_runs(swarm: CoordinatedSwarm, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    done = run("coordinator", "backup", copy, "--state", swarm.folder / "state")
    assert done.process.returncode == 0, done.printed()
    assert copy.stat().st_size > 0


def test_what_it_has_recorded_is_decided_again_in_the_same_way(swarm: CoordinatedSwarm) -> None:
    found = ask(swarm, "coordinator", "replay")
    assert found["events"] > 10
    assert found["differences"] == []


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_token_of_another_role_orders_nothing(swarm: CoordinatedSwarm, role: str) -> None:
    refused = run("replan", "--join", swarm.tokens[role])
    assert refused.process.returncode == 2
    assert "use an admin's" in refused.err.text


def test_no_secret_is_printed_but_the_tokens_to_paste(swarm: CoordinatedSwarm) -> None:
    state = swarm.folder / "state"
    ledger = json.loads((state / "credentials.json").read_text())
    admin = (state / "admin.token").read_text()
    for command in swarm.commands:
        assert admin not in command.printed()
        assert not any(secret in command.printed() for secret in ledger["keys"])


def test_its_p2pd_may_die(swarm: CoordinatedSwarm) -> None:
    coordinator = swarm.coordinator
    assert coordinator is not None
    os.kill(coordinator.daemons().pop(), signal.SIGKILL)
    coordinator.wait_line("has been started again", timeout_s=READY_S)
    swarm.wait_status(lambda status: status["coordinator"]["connected"]["server"] == 2, "both servers are back")


def test_it_ends_at_a_signal_and_leaves_nothing(swarm: CoordinatedSwarm) -> None:
    coordinator = swarm.coordinator
    assert coordinator is not None
    coordinator.signal(signal.SIGTERM)
    assert coordinator.wait(timeout_s=20) == 0, coordinator.printed()
    coordinator.assert_nothing_left()
    later: Command = swarm.start_coordinator()
    later.wait_line("recovered the state after", timeout_s=READY_S)
    wait_for(lambda: swarm.status()["covered"], timeout_s=READY_S, what="the servers are back")
