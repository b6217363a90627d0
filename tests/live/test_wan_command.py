"""`geopetals wan` as a person uses it."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from geopetals.wan import Wan, WanFailure
from geopetals.wan.state import StateDirectory
from geopetals.wan.wan import down
from tests.live.commands import Command, run
from tests.live.wan_programs import run_up, why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.live


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory; what the test leaves running in it is ended."""
    yield tmp_path / "net"
    down(StateDirectory(tmp_path / "net"))


def wan_command(state: Path, action: str, *arguments: str, **options: object) -> Command:
    return run("wan", action, "--state", state, *arguments, **options)  # type: ignore[arg-type]


def test_a_network_from_up_to_down_on_the_command_line(state: Path) -> None:
    began = run_up(state, "--hosts", "a,b", "--rtt", "20ms", "--nat", "b=symmetric", "--json")
    hosts = json.loads(began)["hosts"]
    assert hosts["a"]["address"] == hosts["a"]["public_address"]
    assert hosts["b"]["address"] != hosts["b"]["public_address"]
    script = "import socket, sys; print(sys.stdin.read(), socket.getaddrinfo('127.0.0.1', 1)[0][4]); sys.exit(7)"
    program = Command("wan", "exec", "--state", state, "a", "--", sys.executable, "-c", script, stdin="said")
    assert program.wait() == 7
    assert program.out.text == "said ('127.0.0.1', 1)\n"
    assert program.err.text == ""
    program.destroy()
    wan_command(state, "set", "a-b", "80ms", "--jitter", "1ms", "--loss", "5%", "--bandwidth", "10Mbit/s")
    wan_command(state, "set", "a", "--up", "5Mbit/s")
    wan_command(state, "cut", "a")
    status = json.loads(wan_command(state, "status", "a>b", "--json", "--reset").out.text)
    assert status["cut_hosts"] == ["a"]
    assert status["hosts"]["a"]["up_bit_per_s"] == 5e6
    assert status["links"][0] | {"packets": 0} == {
        "from": "a",
        "to": "b",
        "rtt_s": 0.08,
        "bandwidth_bit_per_s": 1e7,
        "jitter_s": 0.001,
        "loss": 0.05,
        "cut": False,
        "packets": 0,
    }
    assert "histogram" in status["run"]["lateness"]
    wan_command(state, "heal")
    assert "a  11.77.0.1" in wan_command(state, "status").out.text
    assert wan_command(state, "down", "--json").out.text == '{"down": true}\n'
    assert wan_command(state, "down").process.returncode == 0
    assert not state.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("exec", "c", "--", "true"), 2, "there is no host 'c'"),
        (("exec", "a"), 2, "no program"),
        (("exec", "a", "--", "no-such-program"), 127, "no program 'no-such-program'"),
        (("exec", "a", "--", "/"), 126, "cannot be started"),
        (("set", "a-c", "5ms"), 2, "neither a host"),
        (("set", "a-b", "--up", "5Mbit/s"), 2, "name a host"),
        (("set", "a-b"), 2, "nothing is changed"),
        (("up", "--hosts", "x"), 2, "runs in"),
    ],
)
def test_mistakes_are_named_and_harm_nothing(shared: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    action, *rest = arguments
    command = wan_command(shared, action, *rest)
    assert command.process.returncode == code
    assert words in command.err.text
    assert "Traceback" not in command.err.text


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("shared") / "net"
    run_up(path, "--hosts", "a,b")
    yield path
    down(StateDirectory(path))


def test_signals_reach_the_program_itself(shared: Path) -> None:
    program = "import signal, sys\nprint('ready', flush=True)\nsys.exit(40 + signal.sigwait([signal.SIGUSR1]))"
    blocked = f"import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n{program}"
    command = Command("wan", "exec", "--state", shared, "a", "--", sys.executable, "-c", blocked)
    command.wait_line("ready")
    command.signal(signal.SIGUSR1)
    assert command.wait() == 40 + signal.SIGUSR1
    command.destroy()


def test_programs_get_the_environment_they_would_have_outside(shared: Path) -> None:
    show = "import os, json; print(json.dumps(dict(os.environ)))"
    command = wan_command(shared, "exec", "a", "--", sys.executable, "-c", show)
    assert not set(json.loads(command.out.text)) & ({"HIVEMIND_LOGLEVEL", "PETALS_LOGGING"} - set(os.environ))


def test_a_running_network_is_attached_to(shared: Path) -> None:
    wan = Wan.attach(shared)
    assert list(wan.addresses) == ["a", "b"]
    assert wan.run("a", ["true"], check=True).returncode == 0
    with pytest.raises(WanFailure, match="no network runs"):
        Wan.attach(shared / "none")
