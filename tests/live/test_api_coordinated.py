"""The HTTP API of a swarm with a coordinator: what it says when the last server of some blocks is gone."""

import json
import urllib.error
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.live.commands import wait_for
from tests.live.coordinated import READY_S, coordinated

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


def ask(url: str) -> tuple[int, Any]:
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 3}).encode()
    try:
        with urlopen(Request(f"{url}/v1/completions", body), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {**json.load(error), "retry-after": error.headers["Retry-After"]}


def test_missing_blocks_are_503_and_no_matter_of_room(llama: Path, tmp_path: Path) -> None:
    with coordinated(llama, tmp_path) as swarm:
        server = swarm.add_server(wait=True)
        options = ["--join", swarm.tokens["client"], "--port", "0", "--served-model-name", "tiny"]
        url = swarm.run("api", *options).wait_line(r"(http://\S+)/v1", timeout_s=READY_S)[1]
        wait_for(lambda: ask(url)[0] == 200, timeout_s=READY_S, what="an answer")
        server.press_ctrl_c()
        assert server.wait() == 0
        status, found = wait_for(lambda: (answer := ask(url))[0] != 200 and answer, timeout_s=READY_S, what="an error")
        assert (status, found["error"]["code"]) == (503, "blocks_missing"), found
        assert "0:6" in found["error"]["message"]
        assert int(found["retry-after"]) >= 1
        swarm.add_server(wait=True)
        wait_for(lambda: ask(url)[0] == 200, timeout_s=READY_S, what="an answer again")
