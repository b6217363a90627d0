"""The coordinator's options, and what is told to those who give wrong ones."""

import json
from pathlib import Path

import pytest

from geopetals import cli
from geopetals.cli.coordinator import http_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8470", ("127.0.0.1", 8470)),
        (":8470", ("127.0.0.1", 8470)),
        ("[::1]:80", ("::1", 80)),
        ("barn.example:0", ("barn.example", 0)),
    ],
)
def test_http_addresses_are_read(text: str, address: tuple[str, int]) -> None:
    assert http_address(text) == address


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["coordinator"], "which model"),
        (["coordinator", "--model", "x", "--http", "8470"], "no address"),
        (["coordinator", "--model", "x", "--http", "0.0.0.0:8470"], "--http-token"),
        (["coordinator", "backup", "copy.db", "--state", "nowhere"], "no coordinator has kept its state"),
        (["coordinator", "replay", "--state", "nowhere"], "no coordinator has kept its state"),
        (["status", "--url", "ftp://x"], "is no address"),
        (["status", "--state", "nowhere"], "no coordinator has kept its state"),
        (["replan", "--join", "gp2nonsense"], "damaged"),
        (["plan"], "which cluster"),
        (["plan", "--explain", "x.yaml"], "add --live"),
        (["plan", "--live", "x.yaml"], "do not go together"),
    ],
)
def test_wrong_use_is_told_with_what_to_do(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GEOPETALS_HTTP_TOKEN", raising=False)
    assert cli.main(arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    from geopetals.cli.coordinator import _settings
    from geopetals.errors import UnsupportedInput

    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"settle_s": 1.5, "drian_s": 3}))
    with pytest.raises(UnsupportedInput, match="drian_s"):
        _settings(file)
    file.write_text(json.dumps({"settle_s": 1.5}))
    assert _settings(file).settle_s == 1.5
    assert not _settings(file).plan_inline


def test_several_states_have_to_be_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from geopetals.coordinator.folders import only_state
    from geopetals.coordinator.store import Store
    from geopetals.errors import UnsupportedInput

    monkeypatch.setenv("GEOPETALS_STATE", str(tmp_path))
    with pytest.raises(UnsupportedInput, match="no coordinator"):
        only_state()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Store(tmp_path / name / "coordinator.db").close()
        if name == "one":
            assert only_state() == tmp_path / "one"
    with pytest.raises(UnsupportedInput, match="several"):
        only_state()
