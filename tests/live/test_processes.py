"""Who ends when somebody else ends: no process and no socket outlives a server, a swarm or a client."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from geopetals.client.model import DistributedModel
from geopetals.client.session import InferenceSession
from geopetals.join_token import JoinToken
from geopetals.swarm.local import LocalSwarm
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.wire import HANDLER, read_metadata
from tests.live.commands import MARK, Command, Workspace, is_alive, is_daemon, wait_for, wait_gone
from tests.live.conftest import Connect, StartCommand
from tests.models import VOCABULARY

pytestmark = pytest.mark.live

DEADLINE_S = 5.0
READY = r"^serving blocks"


def prompts(length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


def token_of(command: Command) -> str:
    return command.wait_line(r"--join (\S+)")[1]


def ask(token: str, peer_id: str) -> dict[str, Any]:
    """rpc_info of one server."""

    async def call() -> dict[str, Any]:
        network = await Network.start(NetworkConfig(initial_peers=JoinToken.decode(token).peers, client_only=True))
        try:
            answer = await network.p2p.call_protobuf_handler(
                PeerID.from_base58(peer_id), f"{HANDLER}.rpc_info", runtime_pb2.ExpertUID(), runtime_pb2.ExpertInfo
            )
        finally:
            await network.stop()
        return read_metadata(answer.serialized_info)

    return asyncio.run(call())


# -- serve -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "Ctrl-C"])
def test_serve_ends_in_order(llama: Path, start_command: StartCommand, how: str) -> None:
    command = start_command("serve", llama)
    command.wait_line(READY)
    assert len(command.daemons()) == 1
    command.press_ctrl_c() if how == "Ctrl-C" else command.signal(getattr(signal, how))
    assert command.wait(timeout_s=15) == 0, command.printed()
    assert "Traceback" not in command.printed()
    command.assert_nothing_left(timeout_s=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_in_order_while_it_loads(llama: Path, start_command: StartCommand, number: int) -> None:
    """As soon as p2pd is there, and blocks are about to be loaded."""
    command = start_command("serve", llama)
    wait_for(command.daemons, timeout_s=60, what="a p2pd")
    command.signal(number)
    assert command.wait(timeout_s=20) == 0, command.printed()
    assert "Traceback" not in command.printed()
    command.assert_nothing_left()


def test_serve_ends_quietly_while_it_imports(llama: Path, start_command: StartCommand) -> None:
    """Before there is anything to end in order."""
    command = start_command("serve", llama)
    wait_for(lambda: has_mapped(command.pid, "libtorch"), timeout_s=60, what="torch being imported")
    command.press_ctrl_c()
    assert command.wait(timeout_s=20) in (0, 130), command.printed()
    assert "Traceback" not in command.printed()
    command.assert_nothing_left()


def has_mapped(pid: int, library: str) -> bool:
    return any(library in region.path for region in psutil.Process(pid).memory_maps())


def test_p2pd_dies_with_a_killed_server(llama: Path, start_command: StartCommand) -> None:
    command = start_command("serve", llama)
    command.wait_line(READY)
    assert command.daemons()
    command.signal(signal.SIGKILL)
    wait_for(lambda: not command.workspace.processes(), timeout_s=DEADLINE_S, what="end of p2pd")


def test_the_next_server_clears_up_after_a_killed_one(llama: Path, start_command: StartCommand) -> None:
    """Sockets of a killed server stay until another one starts on this machine."""
    killed = start_command("serve", llama)
    killed.wait_line(READY)
    killed.signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert killed.workspace.files()
    command = start_command("serve", llama, env={"TMPDIR": str(killed.workspace.temp_dir)})
    command.wait_line(READY)
    command.signal(signal.SIGTERM)
    assert command.wait() == 0
    assert killed.workspace.files() == []


def test_a_server_comes_back_when_its_p2pd_was_killed(
    llama: Path, start_command: StartCommand, connect: Connect, local: Any
) -> None:
    """On the same address and peer id, with its blocks still loaded; twice."""
    command = start_command("serve", llama)
    token, peer_id = token_of(command), command.wait_line(r"^peer (\S+)")[1]
    for times in (1, 2):
        daemon = command.daemons().pop()
        os.kill(daemon, signal.SIGKILL)
        wait_for(lambda: command.out.text.count("serving blocks") > times, timeout_s=20, what="the server's return")  # noqa: B023
        assert daemon not in command.daemons()
        assert command.out.text.count(f"peer {peer_id}") == times + 1
    model = connect(llama, join=token)
    found = model.generate(prompts(), max_new_tokens=5, do_sample=False)
    assert torch.equal(found, local.generate(prompts(), max_new_tokens=5, do_sample=False))
    assert model.swarm.servers[0].peer_id == peer_id
    command.signal(signal.SIGTERM)
    assert command.wait(timeout_s=15) == 0, command.printed()
    command.assert_nothing_left()


def test_a_server_that_does_not_find_its_first_swarm_again_stays_reachable(
    llama: Path, start_command: StartCommand, connect: Connect
) -> None:
    """Its only bootstrap peer is gone and its own p2pd is killed: a client of its own token still finds it."""
    first = start_command("serve", llama, "--blocks", "0:3")
    second = start_command("serve", llama, "--join", token_of(first))
    token = token_of(second)
    assert second.wait_line(r"serving blocks (\S+) of")[1] == "0:6"
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    os.kill(second.daemons().pop(), signal.SIGKILL)
    wait_for(lambda: second.out.text.count("serving blocks") == 2, timeout_s=60, what="the server's return")
    model = connect(llama, join=token)
    assert model.generate(prompts(), max_new_tokens=3, do_sample=False).shape == (1, 12)


# -- up ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def up(llama: Path, start_command: StartCommand) -> Command:
    """A swarm of three: the command, its preloaded process, three servers, three p2pds."""
    command = start_command("up", llama)
    command.wait_line("Ctrl-C ends the swarm")
    assert len(command.workspace.processes()) == 8
    assert len(command.daemons()) == 3
    return command


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "Ctrl-C"])
def test_up_ends_in_order(up: Command, how: str) -> None:
    up.press_ctrl_c() if how == "Ctrl-C" else up.signal(getattr(signal, how))
    assert up.wait(timeout_s=20) == 0, up.printed()
    assert "Traceback" not in up.printed()
    up.assert_nothing_left(timeout_s=1)


def test_a_killed_up_takes_its_swarm_along(up: Command) -> None:
    up.signal(signal.SIGKILL)
    wait_for(lambda: not up.workspace.processes(), timeout_s=DEADLINE_S, what="end of servers and p2pds")


def test_up_fails_when_one_of_its_servers_is_killed(up: Command) -> None:
    server = next(pid for pid in up.workspace.processes() if any(map(is_daemon, children(pid))))
    os.kill(server, signal.SIGKILL)
    assert up.wait(timeout_s=20) == 1
    assert "geopetals: error: the server of blocks" in up.err.text
    assert not up.workspace.processes()


def children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_up_ends_in_order_while_it_starts(llama: Path, start_command: StartCommand, how: str) -> None:
    command = start_command("up", llama)
    wait_for(command.daemons, timeout_s=60, what="a p2pd")
    command.press_ctrl_c() if how == "Ctrl-C" else command.signal(signal.SIGTERM)
    assert command.wait(timeout_s=20) in (0, 130), command.printed()
    assert "Traceback" not in command.printed()
    command.assert_nothing_left()


def test_a_local_swarm_dies_with_the_program_that_made_it(llama: Path) -> None:
    """Also without its consent: SIGKILL of a program that uses the class."""
    workspace = Workspace()
    program = f"""
        from geopetals.swarm.local import LocalSwarm
        swarm = LocalSwarm({str(llama)!r}).start(servers=2)
        print("ready", flush=True)
        swarm.wait_any_end()
    """
    environment = {**os.environ, **workspace.environment()}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert len(workspace.processes()) == 6
            process.kill()
            wait_for(lambda: not workspace.processes(), timeout_s=DEADLINE_S, what="end of the swarm")
        finally:
            workspace.destroy()


def test_a_preloaded_process_that_is_killed_takes_its_servers_along(llama: Path) -> None:
    with LocalSwarm(str(llama)) as swarm:
        pids = set(swarm.start(servers=2).pids)
        assert len(pids) == 5
        os.kill(swarm.pids[0], signal.SIGKILL)
        wait_gone(pids, timeout_s=DEADLINE_S)
        assert swarm.wait_any_end() is None


# -- clients -----------------------------------------------------------------------------------------------------------


def test_a_client_leaves_nothing_behind(two_stages: LocalSwarm, llama: Path, connect: Connect) -> None:
    before = set(children(os.getpid()))
    model: DistributedModel = connect(llama, join=two_stages.token)
    daemons = set(children(os.getpid())) - before
    assert [is_daemon(pid) for pid in daemons] == [True]
    model.close()
    assert not any(map(is_alive, daemons))


def test_a_killed_client_frees_its_cache(two_stages: LocalSwarm, llama: Path) -> None:
    """SIGKILL in mid-generation: within seconds the servers have as much cache as before."""
    token = two_stages.token
    peers = [server.peer_id for server in two_stages.servers]

    def free() -> list[int]:
        return [ask(token, peer_id)["cache_tokens_available"] for peer_id in peers]

    before = free()
    program = f"""
        import sys, time, torch
        from geopetals import AutoDistributedModelForCausalLM
        model = AutoDistributedModelForCausalLM.from_pretrained({str(llama)!r}, join={token!r})
        with model.inference_session(max_length=512):
            model.generate(torch.full((2, 5), 9), max_new_tokens=4, do_sample=False)
            print("ready", flush=True)
            model.generate(max_new_tokens=500, do_sample=False, eos_token_id=None)
    """
    workspace = Workspace()
    environment = {**os.environ, **workspace.environment()}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert free() == [left - 3 * 2 * 512 for left in before]  # three blocks on each server
            assert process.poll() is None
            process.kill()
            wait_for(lambda: not workspace.processes(), timeout_s=DEADLINE_S, what="end of the client's p2pd")
            wait_for(lambda: free() == before, timeout_s=10, what="the cache being freed")
        finally:
            workspace.destroy()


@pytest.mark.filterwarnings("ignore:.*StreamWriter:pytest.PytestUnraisableExceptionWarning")  # that one is dropped
def test_closed_sessions_free_their_cache(two_stages: LocalSwarm, llama: Path, connect: Connect) -> None:
    """Closed in order, and dropped without being closed."""
    token, peer_id = two_stages.token, two_stages.servers[0].peer_id
    model: DistributedModel = connect(llama, join=token)
    before = ask(token, peer_id)["cache_tokens_available"]
    for close in (True, False):
        session = InferenceSession(model.swarm, 100)
        session.open(1)
        assert ask(token, peer_id)["cache_tokens_available"] == before - 300
        if close:
            session.close()
        del session
        gc.collect()
        wait_for(
            lambda: ask(token, peer_id)["cache_tokens_available"] == before, timeout_s=10, what="the cache being freed"
        )


def test_a_model_that_is_closed_during_a_session(two_stages: LocalSwarm, llama: Path, connect: Connect) -> None:
    """It frees the cache, and the session's own end finds nothing to do."""
    token, peer_id = two_stages.token, two_stages.servers[0].peer_id
    before = ask(token, peer_id)["cache_tokens_available"]
    model: DistributedModel = connect(llama, join=token)
    with model.inference_session(max_length=100) as session:
        session.open(1)
        model.close()
    wait_for(lambda: ask(token, peer_id)["cache_tokens_available"] == before, timeout_s=10, what="free cache")


def test_the_mark_reaches_every_process(up: Command) -> None:
    """What the tests above rely on."""
    tree = {up.pid, *(child.pid for child in psutil.Process(up.pid).children(recursive=True))}
    assert tree == up.workspace.processes()
    assert all(psutil.Process(pid).environ()[MARK] == up.workspace.mark for pid in tree)
