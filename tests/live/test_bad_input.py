"""What a person gets wrong is answered with one sentence and exit code 2, and nothing is left running."""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from geopetals.join_token import JoinToken
from geopetals.swarm.local import LocalSwarm
from tests.live.preloaded import Ended, Preloaded

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def preloaded() -> Iterator[Preloaded]:
    preloaded = Preloaded()
    yield preloaded
    preloaded.stop()


@pytest.fixture(scope="module")
def bad_models(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """Directories `llama` in directories by what is wrong with them: a swarm knows its model by this name."""
    root = tmp_path_factory.mktemp("bad")
    without_weights = shutil.ignore_patterns("*.safetensors")
    for name in ("no-weights", "pickle", "no-config"):
        shutil.copytree(llama, root / name / "llama", ignore=without_weights)
    torch.save({"model.embed_tokens.weight": torch.zeros(2)}, root / "pickle/llama/pytorch_model.bin")
    (root / "no-config/llama/config.json").unlink()
    for name in ("truncated", "garbage", "remote-code", "config-is-no-json"):
        shutil.copytree(llama, root / name / "llama")
    weights = root / "truncated/llama/model.safetensors"
    os.truncate(weights, weights.stat().st_size * 2 // 3)
    (root / "garbage/llama/model.safetensors").write_bytes(b"\xff" * 5000)
    (root / "config-is-no-json/llama/config.json").write_text("{")
    edited = json.loads((llama / "config.json").read_text())
    edited |= {"model_type": "own-model", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (root / "remote-code/llama/config.json").write_text(json.dumps(edited))
    (root / "remote-code/llama/own.py").write_text(f"open({str(root / 'executed')!r}, 'w')\n")
    (root / "empty/llama").mkdir(parents=True)
    return root


def refused(ended: Ended, *words: str, code: int = 2) -> str:
    """The one sentence of a command that failed as it should, which has these words."""
    everything = f"code {ended.code}\nstdout: {ended.out}\nstderr: {ended.err}"
    assert ended.code == code, everything
    assert "Traceback" not in ended.out + ended.err, everything
    lines = ended.err.strip().splitlines()
    errors = [line for line in lines if re.match(r"geopetals( \w+)?: error: ", line)]
    assert len(errors) == 1, everything
    assert lines[-1] == errors[0], everything
    sentence = errors[0].split("error: ", 1)[1]
    assert all(word in sentence for word in words), everything
    return sentence


# -- models ------------------------------------------------------------------------------------------------------------

MODELS = {
    "/nowhere/at-all": "/nowhere/at-all",
    "nobody/no-such-model": "nobody/no-such-model",
    "BAD/no-weights/llama": "weights",
    "BAD/pickle/llama": "safetensors",
    "BAD/no-config/llama": "config.json",
    "BAD/config-is-no-json/llama": "config.json",
    "BAD/remote-code/llama": "code of its own",
    "BAD/truncated/llama": "model.safetensors",
    "BAD/garbage/llama": "model.safetensors",
    "BAD/empty/llama": "config.json",
}


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
@pytest.mark.parametrize(("model", "word"), MODELS.items())
def test_bad_model(
    preloaded: Preloaded, bad_models: Path, two_stages: LocalSwarm, command: str, model: str, word: str
) -> None:
    name = model.replace("BAD", str(bad_models))
    arguments = {
        "serve": ["serve", name],
        "generate": ["generate", "--join", two_stages.token, "--model", name, "hello"],
        "chat": ["chat", "--join", two_stages.token, "--model", name],
    }[command]
    refused(preloaded.run(*arguments), word)
    assert not (bad_models / "executed").exists()


@pytest.mark.parametrize("model", ["/nowhere/at-all", "BAD/pickle/llama", "BAD/truncated/llama"])
def test_bad_model_for_a_whole_swarm(preloaded: Preloaded, bad_models: Path, model: str) -> None:
    refused(preloaded.run("up", model.replace("BAD", str(bad_models))), MODELS[model])


def test_a_shard_that_is_missing(preloaded: Preloaded, sharded_llama: Path, tmp_path: Path) -> None:
    """Only for those who need its blocks."""
    copy = shutil.copytree(sharded_llama, tmp_path / "model")
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    missing = index["model.layers.5.mlp.up_proj.weight"]
    (copy / missing).unlink()
    refused(preloaded.run("serve", copy), missing)
    refused(preloaded.run("serve", copy, "--blocks", "4:6"), missing)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["0:7", "6:9", "100:200"])
def test_blocks_outside_the_model(preloaded: Preloaded, llama: Path, blocks: str) -> None:
    refused(preloaded.run("serve", llama, "--blocks", blocks), blocks, "0:6")


@pytest.mark.parametrize("blocks", ["3", "3:3", "4:2", "a:b", "-1:3", "1:2:3", ""])
def test_malformed_blocks(preloaded: Preloaded, llama: Path, blocks: str) -> None:
    refused(preloaded.run("serve", llama, f"--blocks={blocks}"), "--blocks")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--dtype", "int3"),
        ("--device", "tpu"),
        ("--device", "cuda:99"),
        ("--memory", "much"),
        ("--port", "65536"),
        ("--kv-cache-tokens", "0"),
    ],
)
def test_bad_values(preloaded: Preloaded, llama: Path, option: str, value: str) -> None:
    refused(preloaded.run("serve", llama, option, value), value)


@pytest.mark.parametrize("servers", ["0", "7", "many"])
def test_servers_that_cannot_share_the_blocks(preloaded: Preloaded, llama: Path, servers: str) -> None:
    refused(preloaded.run("up", llama, "--servers", servers), servers)


@pytest.mark.parametrize("command", ["serve", "up"])
def test_too_little_memory(preloaded: Preloaded, llama: Path, command: str) -> None:
    refused(preloaded.run(command, llama, "--memory", "1MB"), "1.0 MB may be used")


def test_no_model_and_no_token(preloaded: Preloaded) -> None:
    refused(preloaded.run("serve"), "--join")
    refused(preloaded.run("generate", "hello"), "--join")


def test_an_empty_prompt(preloaded: Preloaded, two_stages: LocalSwarm) -> None:
    refused(preloaded.run("generate", "--join", two_stages.token, ""), "empty")


def test_a_prompt_longer_than_the_servers_allow(preloaded: Preloaded, two_stages: LocalSwarm) -> None:
    arguments = ["generate", "--join", two_stages.token, "hello", "--max-new-tokens", "9999999"]
    refused(preloaded.run(*arguments), "16384", code=1)


# -- places ------------------------------------------------------------------------------------------------------------


def test_port_in_use(preloaded: Preloaded, llama: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused(preloaded.run("serve", llama, "--port", port), port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_address_of_another_machine(preloaded: Preloaded, llama: Path, host: str) -> None:
    refused(preloaded.run("serve", llama, "--host", host), host)


@pytest.mark.parametrize("kind", ["directory", "missing parent", "no key"])
def test_bad_identity_file(preloaded: Preloaded, llama: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "identity"
    if kind == "directory":
        path.mkdir()
    elif kind == "no key":
        path.write_text("this is no key")
    else:
        path = tmp_path / "nowhere/identity"
    refused(preloaded.run("serve", llama, "--identity", path), str(path))


def test_an_identity_that_cannot_be_written(preloaded: Preloaded, llama: Path) -> None:
    """/proc takes no files, not even from root."""
    refused(preloaded.run("serve", llama, "--identity", "/proc/identity"), "/proc/identity")


def test_full_disk_while_loading(preloaded: Preloaded, llama: Path, tmp_path: Path) -> None:
    """A temporary directory without room, on a real file system of 64 KiB: p2pd's folder or the view cannot be made."""
    mount = tmp_path / "small"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k,nr_inodes=2", "none", str(mount)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], check=False).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        refused(preloaded.run("serve", llama, env={"TMPDIR": str(mount)}), "free some space")
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


# -- tokens and swarms -------------------------------------------------------------------------------------------------


def joining(command: str, token: str, *more: str | Path) -> list[str | Path]:
    if command == "serve":
        return ["serve", *more, "--join", token]
    return [*(["generate", "hello"] if command == "generate" else ["chat"]), "--join", token]


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
@pytest.mark.parametrize("damage", ["cut", "mistyped", "foreign", "newer", "nothing"])
def test_bad_token(preloaded: Preloaded, llama: Path, two_stages: LocalSwarm, command: str, damage: str) -> None:
    token = two_stages.token
    middle = len(token) // 2
    broken = {
        "cut": token[:-7],
        "mistyped": token[:middle] + ("2" if token[middle] != "2" else "3") + token[middle + 1 :],
        "foreign": "hf_abcdefghijklmnop",
        "newer": "gp9" + token[3:],
        "nothing": "gp1",
    }[damage]
    refused(preloaded.run(*joining(command, broken, llama)), "token")


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
@pytest.mark.parametrize("other", ["small_llama", "retrained_llama"])
def test_swarm_of_another_model(
    request: pytest.FixtureRequest, preloaded: Preloaded, two_stages: LocalSwarm, command: str, other: str
) -> None:
    """Of another architecture, and of other weights: told by the token already."""
    model = str(request.getfixturevalue(other))
    arguments = ["serve", model] if command == "serve" else [command, "--model", model]
    arguments += ["hello"] if command == "generate" else []
    sentence = refused(preloaded.run(*arguments, "--join", two_stages.token), "model")
    assert "weights" in sentence if other == "retrained_llama" else "configurations" in sentence


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("other", ["small_llama", "retrained_llama"])
def test_swarm_of_another_model_without_a_token(
    request: pytest.FixtureRequest, preloaded: Preloaded, two_stages: LocalSwarm, command: str, other: str
) -> None:
    """Told by what the servers say of themselves."""
    model = str(request.getfixturevalue(other))
    peers = JoinToken.decode(two_stages.token).peers
    arguments = [command, "--model", model, *(["hello"] if command == "generate" else [])]
    refused(preloaded.run(*arguments, "--dht-prefix", "llama", "--initial-peers", *peers), "model")


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
def test_unreachable_swarm(preloaded: Preloaded, llama: Path, two_stages: LocalSwarm, command: str) -> None:
    token = JoinToken.decode(two_stages.token)
    peer = token.peers[0].rpartition("/")[2]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    nobody = JoinToken(
        swarm=token.swarm, model=str(llama), identity=token.identity, peers=(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}",)
    )
    refused(preloaded.run(*joining(command, nobody.encode(), llama)), f"127.0.0.1/tcp/{port}")


@pytest.mark.parametrize("address", ["127.0.0.1:31330", "/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1/p2p/nobody"])
def test_addresses_that_are_none(preloaded: Preloaded, llama: Path, address: str) -> None:
    refused(preloaded.run("generate", "hello", "--model", llama, "--initial-peers", address))
