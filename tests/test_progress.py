import io
import os
import pty

import pytest

from geopetals.progress import Console, Reporter, Silent
from geopetals.units import in_units


def test_lines_carry_their_prefix_and_nothing_else() -> None:
    stream = io.StringIO()
    Console(stream, prefix="[1] ").line("model: tiny")
    assert stream.getvalue() == "[1] model: tiny\n"


def test_without_a_terminal_a_task_is_one_line_when_it_is_done() -> None:
    stream = io.StringIO()
    reporter = Console(stream)
    with reporter.task("loading", total=10) as advance:
        advance(4)
        assert stream.getvalue() == ""
        advance(6)
    assert stream.getvalue() == "loading\n"


def test_a_task_that_fails_is_not_called_done() -> None:
    stream = io.StringIO()
    with pytest.raises(OSError, match="disk"), Console(stream).task("loading", total=10):
        raise OSError("disk full")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("unit", ["bytes", "blocks"])
def test_a_terminal_shows_a_bar_and_in_the_end_the_line(unit: str) -> None:
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb", buffering=0) as screen:
        with os.fdopen(follower, "w") as terminal, Console(terminal).task("loading", total=100, unit=unit) as advance:
            advance(100)
        seen = b""
        while True:
            try:
                part = screen.read(4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            seen += part
    assert b"loading" in seen
    assert seen.rstrip().endswith(b"loading")


def test_the_default_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    Console().line("to people")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "to people\n")


def test_silence_is_a_reporter(capsys: pytest.CaptureFixture[str]) -> None:
    reporter: Reporter = Silent()
    reporter.line("text")
    with reporter.task("loading", total=1) as advance:
        advance(1)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_500_000, "1.5 MB"),
        (2_340_000_000, "2.3 GB"),
        (5e12, "5.0 TB"),
        (4e15, "4000.0 TB"),
    ],
)
def test_sizes_are_short(count: float, text: str) -> None:
    assert in_units(count) == text
