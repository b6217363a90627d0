"""Commands without their start-up time: one process imports everything, then forks for each command.

A bad argument is refused in 0.2 s instead of 5 s. Run as a program it reads one JSON object a line ({"argv", "env",
"stdout", "stderr"}) and answers each with the exit code; `Preloaded` is its other end.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.live.commands import Workspace, run_and_exit, wait_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A command that has ended by itself, with nothing left."""

    code: int
    out: str
    err: str


class Preloaded:
    """Runs one command after another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.live.preloaded"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str | Path, env: dict[str, str] | None = None) -> Ended:
        workspace = Workspace()
        out, err = workspace.temp_dir / "out", workspace.temp_dir / "err"
        command = {
            "argv": list(map(str, arguments)),
            "env": {**workspace.environment(), **(env or {})},
            "stdout": str(out),
            "stderr": str(err),
        }
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            wait_for(lambda: not workspace.processes(), timeout_s=5, what="end of the command's processes")
            assert sorted(workspace.files()) == ["err", "out"]
            return Ended(code=code, out=out.read_text(), err=err.read_text())
        finally:
            workspace.destroy()

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def _serve() -> None:
    from geopetals.cli import build_parser, logs

    logs.configure(build_parser().parse_args(["doctor"]))
    import geopetals.client.conversation
    import geopetals.swarm.local
    import geopetals.swarm.server  # noqa: F401

    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run_and_exit(partial(_run, command))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(command: dict[str, Any]) -> int:
    for number, name in ((0, os.devnull), (1, command["stdout"]), (2, command["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
    # What this process starts is found by the mark; this process itself is waited for.
    os.environ.update(command["env"])
    tempfile.tempdir = None
    from geopetals.cli import main

    return main(command["argv"])


if __name__ == "__main__":
    _serve()
