"""The documented quick start, line by line, as it stands in docs/index.md, and the README's Python."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.swarm.local import LocalSwarm
from tests.live.commands import wait_for
from tests.live.conftest import StartCommand
from tests.live.coordinated import QUICK, READY_S
from tests.test_docs import DOCS, PYTHON, ROOT, commands

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


def test_the_readmes_python_works_as_written(llama: Path, two_stages: LocalSwarm, local: Any) -> None:
    (code,) = PYTHON.findall((ROOT / "README.md").read_text())
    for placeholder, value in (("MODEL", str(llama)), ("gp2...", two_stages.token)):
        assert f'"{placeholder}"' in code
        code = code.replace(f'"{placeholder}"', repr(value))
    code += "\nprint(json.dumps([inputs[0].tolist(), first[0].tolist(), more[0].tolist()]))\n"
    done = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    inputs, first, more = json.loads(done.stdout.splitlines()[-1])
    ids = torch.tensor([inputs])
    expected = local.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)[0].tolist()
    assert first + more == expected
    assert done.stderr == ""
