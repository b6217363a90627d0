"""Text that comes in pieces is the whole text."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel

from geopetals.gateway.text import Detokenizer, StopScanner


def decode_bytes(tokens: object) -> str:
    return bytes(tokens).decode(errors="replace")  # type: ignore[call-overload, no-any-return]


@given(st.text(max_size=40))
def test_pieces_are_the_text_and_never_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(decode_bytes)
    pieces = [detokenizer.add(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.end() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    detokenizer = Detokenizer(decode_bytes)
    assert [detokenizer.add(byte) for byte in "é".encode()[:1]] == [""]
    assert detokenizer.end() == "\ufffd"


PIECES = st.lists(st.text(alphabet="ab", max_size=4), max_size=12)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


@given(PIECES, STOPS)
def test_what_is_shown_ends_before_the_first_stop_text(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces:
        shown += scanner.add(piece)
        if scanner.is_found:
            break
    shown += scanner.end()
    text = "".join(pieces)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert scanner.is_found == bool(ends)
    if not ends:
        assert shown == text
        return
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert any(text[len(shown) :].startswith(stop) for stop in stops)


@given(PIECES, STOPS)
def test_only_what_may_become_a_stop_text_is_held_back(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = came = ""
    for piece in pieces:
        came += piece
        shown += scanner.add(piece)
        if scanner.is_found:
            return
        held = came[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_text_that_goes_on_keeps_the_space_it_begins_with() -> None:
    words = Tokenizer(WordLevel({"▁Once": 0, "▁upon": 1, "▁a": 2}, unk_token="▁a"))
    words.decoder = Metaspace()
    assert words.decode([1]) == "upon"  # alone it has none
    detokenizer = Detokenizer(lambda tokens: words.decode(list(tokens)), [0])
    assert [detokenizer.add(1), detokenizer.add(2), detokenizer.end()] == [" upon", " a", ""]


@given(st.text(max_size=20), st.text(max_size=20))
def test_what_goes_on_from_a_prompt_is_the_text_alone(prompt: str, text: str) -> None:
    detokenizer = Detokenizer(decode_bytes, list(prompt.encode()))
    assert "".join(detokenizer.add(byte) for byte in text.encode()) + detokenizer.end() == text


def test_a_prompt_that_ends_in_half_a_character() -> None:
    detokenizer = Detokenizer(decode_bytes, list("é".encode()[:1]))
    assert detokenizer.add(ord("a")) == "a"
