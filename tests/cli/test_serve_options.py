"""`geopetals serve` understands the flags that PETALS' users type."""

import pytest

from geopetals.cli import build_parser

PEER = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWAkxmPQg8FgoTvy7Wi2hWbjBJYuFBQ1q2JX7oxEkXb4jD"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["--block_indices", "2:5"], ["--blocks", "2:5"]),
        (["--num_blocks", "3"], ["--max-blocks", "3"]),
        (["--initial_peers", PEER, PEER], ["--initial-peers", PEER, PEER]),
        (["--new_swarm"], ["--new-swarm"]),
        (["--public_name", "Ada"], ["--name", "Ada"]),
    ],
)
def test_petals_spellings_mean_the_same(theirs: list[str], ours: list[str]) -> None:
    parser = build_parser()
    command, plain = ["serve", "model", *theirs], ["serve", "model"]
    assert vars(parser.parse_args(command)) == vars(parser.parse_args(["serve", "model", *ours]))
    assert vars(parser.parse_args(command)) != vars(parser.parse_args(plain))


@pytest.mark.parametrize("pair", [["--blocks", "0:2", "--num_blocks", "2"], ["--join", "gp1", "--initial_peers", PEER]])
def test_what_contradicts_itself_is_refused(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["serve", "model", *pair])
    assert stop.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
