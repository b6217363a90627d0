"""Nothing is left of an emulated network, however it ends, and nobody else's is touched."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from geopetals.wan import Wan, WanError, WanFailure, processes
from geopetals.wan.state import StateDirectory
from geopetals.wan.wan import down, start
from tests.live.commands import is_alive, run, wait_for
from tests.live.wan_programs import AB, STUBBORN, running, why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.live


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory; what the test leaves running in it is ended."""
    yield tmp_path / "net"
    down(StateDirectory(tmp_path / "net"))


def test_every_process_is_ended_before_the_network(state: Path) -> None:
    started = start(StateDirectory(state), AB)
    wan = Wan.attach(state)
    with running(wan, "a", STUBBORN) as stubborn, running(wan, "b", "print('ready', flush=True); input()") as polite:
        assert down(StateDirectory(state))
        assert stubborn.wait(10) == -signal.SIGKILL
        assert polite.wait(10) != 0
    assert started.daemon.wait(10) == 0
    assert not state.exists()


@pytest.mark.parametrize("again", [True, False], ids=["up", "down"])
def test_a_killed_router_leaves_nothing_that_is_not_cleaned_up(state: Path, again: bool) -> None:
    started = start(StateDirectory(state), AB)
    wan = Wan.attach(state)
    with running(wan, "a", STUBBORN) as stubborn:
        started.daemon.kill()
        started.daemon.wait(10)
        assert "is gone" in run("wan", "exec", "--state", state, "a", "--", "true").err.text
        with pytest.raises(WanFailure, match="is gone"):
            wan.cut("a")
        with Wan(AB) as other, running(other, "a", STUBBORN) as spared:
            if again:
                successor = start(StateDirectory(state), AB)
            else:
                down(StateDirectory(state))
            assert stubborn.wait(10) == -signal.SIGKILL
            assert spared.poll() is None
    down(StateDirectory(state))
    if again:
        successor.daemon.wait(10)
    assert not state.exists()


def test_a_stopped_router_is_killed(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geopetals.wan.control._TIMEOUT_S", 0.2)
    monkeypatch.setattr("geopetals.wan.wan._END_S", 0.2)
    started = start(StateDirectory(state), AB)
    os.kill(started.daemon.pid, signal.SIGSTOP)
    down(StateDirectory(state))
    assert started.daemon.wait(10) == -signal.SIGKILL
    assert not state.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_network_ends_with_the_process_that_wanted_it(number: signal.Signals) -> None:
    program = f"""
import sys, time
from geopetals.wan import Wan, WanSpec
with Wan(WanSpec.uniform(["a"], rtt_s=0)) as wan:
    sleeper = wan.popen("a", [sys.executable, "-c", {STUBBORN!r}], stdout=sys.stdout)
    print(wan.status()["pid"], sleeper.pid, wan.directory.path, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        lines = [owner.stdout.readline() for _ in range(2)]
        router, sleeper, directory = next(line for line in lines if line != "ready\n").split()
        owner.send_signal(number)
    wait_for(
        lambda: not is_alive(int(router)) and not is_alive(int(sleeper)), timeout_s=20, what="end of all processes"
    )
    assert not Path(directory).exists()


def test_a_directory_of_another_user_is_not_used(tmp_path: Path) -> None:
    state = tmp_path / "net"
    state.mkdir()
    os.chown(state, 12345, 12345)
    with pytest.raises(WanError, match="another user"):
        start(StateDirectory(state), AB)
    os.chown(state, os.geteuid(), os.getegid())
    state.chmod(0o777)
    with pytest.raises(WanError, match="others may write"):
        start(StateDirectory(state), AB)


IN_A_NETWORK_OF_ITS_OWN = """
import json, subprocess, sys
from pathlib import Path
from geopetals.wan import namespaces
from geopetals.wan.state import StateDirectory
from geopetals.wan.wan import down
namespaces.isolate()
host = namespaces.create("11.77.0.1", 8)
directory = StateDirectory(Path(sys.argv[1]))
directory.make()
hosts = {"a": {"namespace": list(host.identity), "cookie": host.cookie}}
directory.write_state({"pid": 0, "start_time": 0, "hosts": hosts})
with subprocess.Popen(["sleep", "600"]) as neighbour:
    if sys.argv[2] == "outside":
        namespaces.isolate()
    down(directory)
    print(neighbour.poll())
    neighbour.kill()
"""


@pytest.mark.parametrize(("where", "ended"), [("inside", "None"), ("outside", str(-signal.SIGTERM))])
def test_nobody_in_our_own_network_is_ended(state: Path, where: str, ended: str) -> None:
    command = [sys.executable, "-c", IN_A_NETWORK_OF_ITS_OWN, str(state), where]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [ended]


def test_namespaces_are_held_while_their_processes_are_ended(state: Path) -> None:
    started = start(StateDirectory(state), AB)
    with running(Wan.attach(state), "a", STUBBORN) as program:
        started.daemon.kill()
        started.daemon.wait(10)
        cookies = {tuple(host["namespace"]): host["cookie"] for host in started.state["hosts"].values()}
        own = Path(f"/proc/{program.pid}/ns/net").stat()
        with processes.still_theirs(cookies) as left:
            assert left == {(own.st_dev, own.st_ino)}
            program.kill()
            program.wait(10)
            assert left <= open_here()
        assert not left & open_here()
        with processes.still_theirs(dict.fromkeys(cookies, 1)) as left:
            assert not left


def open_here() -> set[tuple[int, int]]:
    """What files this process has open."""
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            status = os.fstat(int(file.name))
            found.add((status.st_dev, status.st_ino))
    return found


DROP_CAPABILITIES = """
import ctypes, os, sys
kept = set(map(int, sys.argv[1].split(",")))
for number in range(64):
    if number not in kept:
        ctypes.CDLL(None).prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.executable, [sys.executable, "-m", "geopetals", *sys.argv[2:]])
"""
NO_CAPABILITY, SETFCAP = "63", "31"


def without_capabilities(kept: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """As a user who is nobody special, but for the files that they own; SETFCAP lets such a root map itself."""
    command = [sys.executable, "-c", DROP_CAPABILITIES, kept, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_a_network_without_root_is_in_a_user_namespace(state: Path) -> None:
    options = ("--state", str(state))
    began = without_capabilities(SETFCAP, "wan", "up", *options, "--hosts", "a,b", "--rtt", "10ms", "--json")
    assert began.returncode == 0, began.stderr
    assert json.loads(began.stdout)["rootless"]
    show = "import os; print(os.getuid(), os.readlink('/proc/self/ns/user'))"
    done = without_capabilities(SETFCAP, "wan", "exec", *options, "a", "--", sys.executable, "-c", show)
    uid, namespace = done.stdout.split()
    assert int(uid) == os.getuid()
    assert namespace != str(Path("/proc/self/ns/user").readlink())
    wan = Wan.attach(state)
    with running(wan, "a", STUBBORN) as stubborn:
        os.kill(json.loads(began.stdout)["pid"], signal.SIGKILL)
        ended = without_capabilities(SETFCAP, "wan", "down", *options)
        assert ended.returncode == 0, ended.stderr
        assert stubborn.wait(10) == -signal.SIGKILL
    assert not state.exists()


def test_where_nothing_is_allowed_a_sentence_says_what_would_be(state: Path) -> None:
    refused = without_capabilities(NO_CAPABILITY, "wan", "up", "--state", str(state), "--hosts", "a")
    assert refused.returncode == 2
    assert "run it as root" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not state.exists()
