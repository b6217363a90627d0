import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest

from geopetals import cli
from geopetals.cli import chat, demo, generate, serve, up
from geopetals.errors import UnsupportedInput
from geopetals.swarm.entering import default_host

WHERE = ["--join", "gp1x"]


def parse(module: Any, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="geopetals")
    module.add_arguments(parser)
    return parser.parse_args(arguments)


def usage_error(module: Any, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(module, *arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_greedy_is_the_default() -> None:
    assert generate.sampling(parse(generate, "hi", *WHERE))["do_sample"] is False


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--temperature", "0.7"], {"do_sample": True, "temperature": 0.7}),
        (["--top-p", "0.9"], {"do_sample": True, "top_p": 0.9}),
        (["--temperature", "1.2", "--top-p", "0.5"], {"do_sample": True, "temperature": 1.2, "top_p": 0.5}),
    ],
)
def test_sampling_is_what_was_asked_for(arguments: list[str], expected: dict[str, Any]) -> None:
    assert generate.sampling(parse(generate, "hi", *WHERE, *arguments)) == expected


def test_temperature_zero_is_greedy() -> None:
    args = parse(generate, "hi", *WHERE, "--temperature", "0", "--top-p", "0.5")
    assert generate.sampling(args)["do_sample"] is False


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--temperature", "warm"],
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--top-p", "-0.1"],
        ["--max-new-tokens", "0"],
        ["--max-new-tokens", "-5"],
        ["--max-new-tokens", "many"],
        ["--seed", "x"],
        ["--seed", "-99999999999999999999"],
        ["--dtype", "float99"],
        ["--device", "toaster"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("module", [generate, chat], ids=["generate", "chat"])
def test_numbers_that_make_no_sense_are_usage_errors(
    module: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["hi"] if module is generate else []
    assert arguments[0] in usage_error(module, capsys, *text, *WHERE, *arguments)


def test_a_swarm_has_to_be_named_in_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--join" in usage_error(generate, capsys, "hi")
    assert "not allowed with" in usage_error(generate, capsys, "hi", *WHERE, "--initial-peers", "/ip4/1.2.3.4")
    assert parse(generate, "hi", "--initial-peers", "/a", "/b").initial_peers == ["/a", "/b"]


def test_a_prompt_may_begin_with_anything() -> None:
    assert parse(generate, *WHERE, "--", "--help me").prompt == "--help me"
    assert parse(generate, *WHERE, "-").prompt == "-"


def test_a_token_that_is_none_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate", "hi"], ["chat"], ["serve"]):
        assert cli.main([*command, "--join", "gp1wrong"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert "token" in captured.err


def test_peers_without_a_model_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "hi", "--initial-peers", "/ip4/127.0.0.1/tcp/1/p2p/x"]) == 2
    assert "model" in capsys.readouterr().err


def test_serving_needs_a_model_or_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedInput, match="which model"):
        serve.run(parse(serve))
    assert "not allowed with" in usage_error(serve, capsys, "tiny", "--new-swarm", *WHERE)


def test_a_server_listens_to_this_machine_only_unless_told() -> None:
    """The coordinator of a token may be elsewhere: then the default is another one."""
    args = parse(serve, "tiny")
    assert (args.host, args.port, args.public_ip, args.blocks) == (None, 0, None, None)
    assert default_host(None) == "127.0.0.1"


def test_a_servers_options_are_read() -> None:
    args = parse(
        serve, "tiny", "--blocks", "2:5", "--memory", "4GiB", "--kv-cache-tokens", "100", "--port", "31330",
        "--identity", "key", "--dtype", "bfloat16", "--device", "cpu", "--name", "me",
    )  # fmt: skip
    assert (args.blocks, args.memory, args.kv_cache_tokens, args.port) == ((2, 5), 4 * 2**30, 100, 31330)
    assert (args.identity, args.dtype, args.device, args.name) == (Path("key"), "bfloat16", "cpu", "me")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--blocks", "5:2"],
        ["--blocks", "3"],
        ["--blocks", "3:3"],
        ["--blocks", "-1:3"],
        ["--port", "70000"],
        ["--port", "-1"],
        ["--memory", "lots"],
        ["--memory", "0"],
        ["--kv-cache-tokens", "0"],
    ],
    ids=" ".join,
)
def test_wrong_options_of_a_server_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments[0] in usage_error(serve, capsys, "tiny", *arguments)


@pytest.mark.parametrize("module", [up, demo], ids=["up", "demo"])
def test_a_local_swarm_has_three_servers_unless_told(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["tiny"] if module is up else []
    assert parse(module, *text).servers == 3
    assert parse(module, *text, "--servers", "2").servers == 2
    assert "--servers" in usage_error(module, capsys, *text, "--servers", "0")


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        module = importlib.import_module(f"geopetals.cli.{command}")
        with pytest.raises(SystemExit) as caught:
            parse(module, "--help")
        assert caught.value.code == 0
        assert module.HELP
    assert "--max-new-tokens" in capsys.readouterr().out
