"""A swarm from the installed wheel, where the source tree cannot be reached."""

import json
import os
import re
import subprocess
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.live.commands import Workspace, wait_for
from tests.packaging.installed import ROOT, Installed, build, environment

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


def test_an_installed_swarm_answers(llama: Path, tmp_path: Path) -> None:
    (wheel,) = build(ROOT, tmp_path / "dist", "wheel")
    installed = Installed(tmp_path / "environment", wheel)
    workspace = Workspace()
    output = tmp_path / "output"
    try:
        with output.open("w") as out:
            process = subprocess.Popen(
                [installed.bin / "geopetals", "up", llama, "--servers", "2", "--api", "--port", "0"],
                cwd=tmp_path, env={**environment(), **workspace.environment()}, stdout=out, stderr=out,
            )  # fmt: skip
        found = wait_for(
            lambda: re.search(r"(http://\S+)/v1", output.read_text()) or process.poll() is not None,
            timeout_s=120,
            what=output.read_text,
        )
        assert isinstance(found, re.Match), output.read_text()
        body = json.dumps({"model": llama.name, "prompt": "hello", "max_tokens": 4}).encode()
        request = Request(f"{found[1]}/v1/completions", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        children = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workspace.processes()]
        assert not [line for line in children if os.fsencode(ROOT / "geopetals") in line]
        process.terminate()
        assert process.wait(30) == 0
    finally:
        workspace.destroy()
