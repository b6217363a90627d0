"""Runs a program that must not outlive the process that wanted it: `python orphan_guard.py PARENT_PID PROGRAM [ARG
...]`.

On Linux the kernel is asked for SIGKILL at the parent's death and the program then takes this process over, at no cost.
Elsewhere this process stays and watches the parent.
"""

import os
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Linux: send `signal_number` to this process when its parent thread ends."""
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal_number))
    if os.getppid() != parent_pid:
        os._exit(1)


def _watch(parent_pid: int, command: list[str]) -> int:
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while True:
        try:
            return child.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            if os.getppid() != parent_pid:
                child.kill()


if __name__ == "__main__":
    parent, command_line = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        die_with_parent(parent)
        os.setpgid(0, 0)  # Ctrl-C in a terminal is for the parent, which then ends this program in order
        os.execv(command_line[0], command_line)
    sys.exit(_watch(parent, command_line))
