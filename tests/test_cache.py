from pathlib import Path

import pytest

from geopetals.cache import cache_directory


@pytest.mark.parametrize(
    ("chosen", "xdg", "expected"),
    [
        ("/srv/models", "/xdg", "/srv/models"),
        ("~/models", "", "/home/ada/models"),
        ("", "/xdg", "/xdg/geopetals"),
        ("", "relative", "/home/ada/.cache/geopetals"),
        ("", "", "/home/ada/.cache/geopetals"),
    ],
)
def test_the_most_specific_variable_decides(
    monkeypatch: pytest.MonkeyPatch, chosen: str, xdg: str, expected: str
) -> None:
    monkeypatch.setenv("GEOPETALS_CACHE", chosen)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache_directory() == Path(expected)
