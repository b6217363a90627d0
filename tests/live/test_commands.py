"""The commands as people use them: what one prints is pasted into the next."""

import json
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import base58
import pytest
import torch
from hivemind.proto import crypto_pb2
from transformers import AutoTokenizer

from geopetals.join_token import JoinToken
from geopetals.swarm.local import LocalSwarm
from tests.live import commands
from tests.live.conftest import StartCommand
from tests.live.terminal import Terminal

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]

PROMPT = "The sun rises in the"


def expected_tokens(local: Any, directory: Path, prompt: str, count: int, **options: Any) -> list[int]:
    ids = AutoTokenizer.from_pretrained(directory)(prompt, return_tensors="pt").input_ids
    torch.manual_seed(5)
    output = local.generate(ids, max_new_tokens=count, **{"do_sample": False, **options})
    tokens: list[int] = output[0, ids.shape[1] :].tolist()
    return tokens


def peer_id_of(identity: Path) -> str:
    """By libp2p's specification: of an Ed25519 key, the public key itself with the header of a message and a hash."""
    public = crypto_pb2.PrivateKey.FromString(identity.read_bytes()).data[32:]
    return base58.b58encode(b"\x00\x24\x08\x01\x12\x20" + public).decode()


def test_what_serve_prints_works_when_it_is_pasted(
    llama: Path, local: Any, start_command: StartCommand, tmp_path: Path
) -> None:
    """Two servers and a client, each started by the line that the one before printed."""
    identity = tmp_path / "identity"
    first = start_command("serve", llama, "--blocks", "0:4", "--name", "first", "--identity", identity)
    join = first.wait_line(r"^ +(geopetals serve .*)$")[1]
    assert first.out.text.startswith("serving blocks 0:4 of 6: weights ")
    assert "loaded" in first.err.text
    assert identity.stat().st_mode & 0o777 == 0o600
    assert first.wait_line(r"^peer (\S+)")[1] == peer_id_of(identity)

    second = start_command(*shlex.split(join)[1:], "--blocks", "2:6")
    paste = second.wait_line(r"^ +(geopetals generate .*)$")[1]
    assert JoinToken.decode(shlex.split(paste)[3]).peers != JoinToken.decode(shlex.split(join)[4]).peers

    ended = commands.run(*shlex.split(paste)[1:], "--json", "--max-new-tokens", "12")
    assert ended.process.returncode == 0, ended.printed()
    assert ended.err.text == ""
    answer = json.loads(ended.out.text)
    assert [hop[1:] for hop in answer["route"]] == [[0, 4], [4, 6]]
    assert answer["tokens"] == expected_tokens(local, llama, PROMPT, 12)
    assert answer["prompt"] == PROMPT
    assert answer["num_tokens"] == 12
    assert 0 < answer["ttft_s"] < 60
    assert answer["tokens_per_s"] > 0
    for server in (second, first):
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_serve_takes_the_blocks_that_are_missing(llama: Path, two_stages: LocalSwarm, start_command: Any) -> None:
    """The model comes with the token; the memory has room for two blocks, and 2:3 is served twice."""
    command = start_command("serve", "--join", two_stages.token, "--memory", "9MB")
    start, end = map(int, command.wait_line(r"serving blocks (\d):(\d) of 6").groups())
    assert end - start == 2
    command.signal(signal.SIGTERM)
    assert command.wait() == 0


def test_serve_warns_when_it_is_open_to_others(llama: Path, start_command: StartCommand) -> None:
    command = start_command("serve", llama, "--host", "0.0.0.0", "--blocks", "0:1")
    assert command.wait_line(r"^warning: .*0\.0\.0\.0.*")
    command.wait_line("^serving blocks")
    assert "this machine only" not in command.out.text


def test_generate_as_text(llama: Path, local: Any, two_stages: LocalSwarm) -> None:
    """The prompt comes from standard input, the answer is sampled with a seed."""
    options = ["--temperature", "1.5", "--top-p", "0.9", "--seed", "5", "--max-new-tokens", "12"]
    ended = commands.run("generate", "-", "--join", two_stages.token, *options, stdin=PROMPT)
    assert ended.process.returncode == 0, ended.printed()
    tokens = expected_tokens(local, llama, PROMPT, 12, do_sample=True, temperature=1.5, top_p=0.9)
    assert ended.out.text == AutoTokenizer.from_pretrained(llama).decode(tokens, skip_special_tokens=True) + "\n"


def test_up_serves_whom_it_tells(llama: Path, local: Any, start_command: StartCommand) -> None:
    swarm = start_command("up", llama, "--servers", "2")
    paste = swarm.wait_line(r"^ +(geopetals generate .*)$")[1]
    swarm.wait_line("Ctrl-C ends the swarm")
    assert re.findall(r"blocks (\d:\d), weights", swarm.out.text) == ["0:3", "3:6"]
    ended = commands.run(*shlex.split(paste)[1:], "--json", "--max-new-tokens", "4")
    assert json.loads(ended.out.text)["tokens"] == expected_tokens(local, llama, PROMPT, 4)
    swarm.press_ctrl_c()
    assert swarm.wait() == 0


def test_doctor() -> None:
    ended = commands.run("doctor", "--json")
    assert ended.process.returncode == 0, ended.printed()
    facts = json.loads(ended.out.text)
    assert facts["problems"] == []


# -- chat --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(smollm2_cache: Path) -> Iterator[LocalSwarm]:
    """A model that answers in words."""
    with LocalSwarm(str(smollm2_cache / "models/SmolLM2-135M-Instruct")) as swarm:
        yield swarm.start(servers=2)


def test_chat_on_a_terminal(talker: LocalSwarm) -> None:
    """Answers come word by word; turns know of each other until /reset; Ctrl-C stops an answer, /quit the program."""
    with Terminal("chat", "--join", talker.token, "--max-new-tokens", "400") as terminal:
        terminal.read_until("\n> ")
        terminal.type("My name is Zacharias. Say hello to me in one short sentence.\n")
        first = terminal.read_until("\n> ")
        assert "Zacharias" in first.partition("\n")[2]

        terminal.chunks.clear()
        terminal.type("What is my name?\n")
        second = terminal.read_until("\n> ").partition("\n")[2]
        assert "Zacharias" in second
        assert sum(bool(chunk.strip()) for chunk in terminal.chunks) > 3, "the answer came all at once"

        terminal.type("/reset\n")
        terminal.read_until("(forgotten)")
        terminal.read_until("> ")
        terminal.type("What is my name?\n")
        assert "Zacharias" not in terminal.read_until("\n> ")

        terminal.type("Write a very long story about a river.\n")
        terminal.read_until("river.\n")
        terminal.read_until(" ")
        terminal.type("\x03")
        stopped = terminal.read_until("\n> ", timeout_s=20)
        assert len(stopped.split()) < 200
        assert terminal.process.poll() is None

        terminal.type("What is the capital of France?\n")
        assert "Paris" in terminal.read_until("\n> ")

        terminal.type("/quit\n")
        screen = terminal.read_to_end(timeout_s=20)
        assert terminal.process.wait(10) == 0
        assert "Traceback" not in screen
        commands.wait_for(lambda: not terminal.workspace.processes(), timeout_s=5, what="end of the client's p2pd")
        assert terminal.workspace.files() == []


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_leaving_chat_from_its_prompt(two_stages: LocalSwarm, key: str) -> None:
    """Ctrl-C and Ctrl-D where no answer is being made."""
    with Terminal("chat", "--join", two_stages.token) as terminal:
        terminal.read_until("\n> ")
        terminal.type(key)
        assert "Traceback" not in terminal.read_to_end(timeout_s=20)
        assert terminal.process.wait(10) == 0
        commands.wait_for(lambda: not terminal.workspace.processes(), timeout_s=5, what="end of the client's p2pd")
        assert terminal.workspace.files() == []


def test_chat_from_a_pipe(talker: LocalSwarm) -> None:
    ended = commands.run(
        "chat", "--join", talker.token, "--max-new-tokens", "24", stdin="What is the capital of France?\n"
    )
    assert ended.process.returncode == 0, ended.printed()
    assert "Paris" in ended.out.text


def test_ctrl_c_ends_generate(two_stages: LocalSwarm, start_command: StartCommand) -> None:
    command = start_command("generate", PROMPT, "--join", two_stages.token, "--max-new-tokens", "5000")
    commands.wait_for(command.daemons, timeout_s=60, what="a p2pd")
    command.press_ctrl_c()
    assert command.wait(timeout_s=20) == 130, command.printed()
    assert "Traceback" not in command.printed()
    command.assert_nothing_left()
