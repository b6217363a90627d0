"""The documented quick start, line by line, as it stands in docs/index.md."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live.commands import wait_for
from tests.live.conftest import StartCommand
from tests.live.coordinated import QUICK, READY_S
from tests.test_docs import DOCS, commands

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


def test_the_quick_start_works_as_written(
    llama: Path, local: object, tmp_path: Path, start_command: StartCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(line)[1:] for line in commands(DOCS / "index.md")]
    assert [line[0] for line in lines] == ["coordinator", "serve", "generate"]
    environment = {**QUICK, "GEOPETALS_CACHE": str(tmp_path / "cache")}
    coordinate, serve, generate = ([word.replace("MODEL", str(llama)) for word in line] for line in lines)
    coordinate[coordinate.index("--http") + 1] = "127.0.0.1:0"  # the documented port may be taken here
    started = start_command(*coordinate, env=environment)
    started.wait_line(r"geopetals serve --join gp2", timeout_s=READY_S)
    server = start_command(*serve, env=environment)
    server.wait_line(r"^serving blocks 0:6", timeout_s=READY_S)

    def answer() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "geopetals", *generate, "--max-new-tokens", "8"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert wait_for(answer, timeout_s=READY_S, what="an answer").strip("\n")
