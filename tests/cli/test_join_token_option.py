"""`--join @FILE`: tokens are secrets that do not belong on a command line."""

import argparse
from pathlib import Path

import pytest

from geopetals.cli import options


def test_a_token_comes_from_a_file_or_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("gp2abc\n")
    assert options.join_token(f"@{tmp_path / 'token'}") == "gp2abc"
    assert options.join_token("gp1abc") == "gp1abc"


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="No such file"):
        options.join_token(f"@{tmp_path / 'nothing'}")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(argparse.ArgumentTypeError, match="no text"):
        options.join_token(f"@{tmp_path / 'binary'}")
