"""Who may ask: a key that was meant but is none lets nobody in by mistake."""

import argparse
from pathlib import Path

import pytest

from geopetals.cli import build_parser
from geopetals.cli.api import api_keys, public_name
from geopetals.errors import UnsupportedInput


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEOPETALS_API_KEY", raising=False)


def parse(*options: str) -> argparse.Namespace:
    return build_parser().parse_args(["api", "--join", "gp2x", *options])


def test_keys_come_from_options_and_files_or_else_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("b\n\n c \n")
    monkeypatch.setenv("GEOPETALS_API_KEY", "d, e")
    assert api_keys(parse()) == ["d", "e"]
    assert api_keys(parse("--api-key", "a", "--api-key-file", str(tmp_path / "keys"))) == ["a", "b", "c"]
    assert api_keys(parse("--no-api-key", "--host", "0.0.0.0")) == []


def test_a_key_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in ("", "\n \n"):
        (tmp_path / "keys").write_text(content)
        with pytest.raises(UnsupportedInput, match="names no key"):
            api_keys(parse("--api-key-file", str(tmp_path / "keys")))
    with pytest.raises(UnsupportedInput, match="names no key"):
        api_keys(parse("--api-key", ""))
    monkeypatch.setenv("GEOPETALS_API_KEY", "")
    with pytest.raises(UnsupportedInput, match="names no key"):
        api_keys(parse())
    with pytest.raises(UnsupportedInput, match="everybody"):
        api_keys(parse("--api-key", "a", "--no-api-key"))


def test_the_api_does_not_tell_where_the_model_is(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    assert public_name(str(tmp_path / "llama")) == "llama"
    assert public_name("people/llama") == "people/llama"


def test_others_are_let_in_without_a_key_only_where_that_is_said() -> None:
    assert api_keys(parse()) == []
    assert api_keys(parse("--host", "0.0.0.0", "--api-key", "a")) == ["a"]
    with pytest.raises(UnsupportedInput, match="other machines"):
        api_keys(parse("--host", "0.0.0.0"))
