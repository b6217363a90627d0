import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from geopetals.swarm import orphan_guard

DEADLINE_S = 5.0
# Starts a guarded sleeper, tells its pid, and waits to be killed.
PARENT = """
import os, subprocess, sys, time
guard, mode = sys.argv[1:]
sleeper = [sys.executable, "-c", "import time; time.sleep(300)"]
child = subprocess.Popen([sys.executable, "-I", "-S", guard, str(os.getpid()), *sleeper])
print(child.pid, flush=True)
sys.exit(0) if mode == "exit" else time.sleep(300)
"""


def wait_until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> bool:
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_dead(pid: int) -> bool:
    """Gone, or a zombie that nobody has collected yet."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def is_sleeper(pid: int) -> bool:
    """Whether the guard has become the program, or has started it."""
    try:
        process = psutil.Process(pid)
        return any("time.sleep(300)" in member.cmdline()[-1] for member in [process, *process.children()])
    except (psutil.Error, IndexError):
        return False


def guarded(mode: str) -> tuple["subprocess.Popen[str]", int]:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, orphan_guard.__file__, mode], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_the_program_dies_with_its_parent(signal_number: signal.Signals) -> None:
    parent, child = guarded("stay")
    with parent:
        assert wait_until(lambda: is_sleeper(child))
        parent.send_signal(signal_number)
        assert parent.wait(DEADLINE_S) == -signal_number
        assert wait_until(lambda: is_dead(child))


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    parent, child = guarded("exit")
    with parent:
        assert parent.wait(DEADLINE_S) == 0
        assert wait_until(lambda: is_dead(child))


def test_the_program_keeps_its_arguments_output_and_exit_code() -> None:
    program = [sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "a b", "--c"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", orphan_guard.__file__, str(os.getpid()), *program],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (7, "['a b', '--c']\n")
