"""`geopetals demo`: a real model, split over three servers, answers a question."""

import json
from pathlib import Path

import pytest

from tests.live import commands

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


def test_demo_as_json(smollm2_cache: Path) -> None:
    ended = commands.run("demo", "--json", env={"GEOPETALS_CACHE": str(smollm2_cache)}, timeout_s=240)
    assert ended.process.returncode == 0, ended.printed()
    assert ended.err.text == ""
    facts = json.loads(ended.out.text)
    assert facts["matches_local"] is True
    assert facts["model"] == "SmolLM2-135M-Instruct"
    assert [server["span"] for server in facts["servers"]] == [[0, 10], [10, 20], [20, 30]]
    assert all(server["memory_bytes"] > server["weights_bytes"] > 10_000_000 for server in facts["servers"])
    assert [[hop["start"], hop["end"]] for hop in facts["chain"]] == [[0, 10], [10, 20], [20, 30]]
    assert [hop["peer_id"] for hop in facts["chain"]] == [server["peer_id"] for server in facts["servers"]]
    assert "sky" in facts["prompt"]
    assert "sky" in facts["text"]
    assert "light" in facts["text"]
    assert len(facts["tokens"]) == facts["num_tokens"] > 20
    assert 0 < facts["ttft_s"] < 60
    assert facts["tokens_per_s"] > 0


def test_demo_for_people(smollm2_cache: Path) -> None:
    """Another question; two servers."""
    question = "What is the capital of France?"
    ended = commands.run("demo", question, "--servers", "2", env={"GEOPETALS_CACHE": str(smollm2_cache)}, timeout_s=240)
    assert ended.process.returncode == 0, ended.printed()
    assert "server 0: blocks 0:15" in ended.out.text or "blocks 0:15" in ended.out.text
    assert "chain you -> 0:15 on" in ended.out.text
    assert f"> {question}" in ended.out.text
    assert "Paris" in ended.out.text
    assert "time to first token" in ended.out.text
    assert "the same tokens as an unmodified local model" in ended.out.text


def test_ctrl_c_ends_the_demo(smollm2_cache: Path) -> None:
    """While its servers start."""
    command = commands.Command("demo", env={"GEOPETALS_CACHE": str(smollm2_cache)})
    try:
        commands.wait_for(command.daemons, timeout_s=60, what="a p2pd")
        command.press_ctrl_c()
        assert command.wait(timeout_s=20) == 130, command.printed()
        assert "Traceback" not in command.printed()
        command.assert_nothing_left()
    finally:
        command.destroy()
