import string
from typing import Any

import base58
import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.errors import TokenError
from geopetals.join_token import JoinToken, swarm_name_for
from geopetals.swarm.identity import ModelIdentity

PEER = "/ip4/203.0.113.7/tcp/31330/p2p/12D3KooWAkxmPQg8FgoTvy7Wi2hWbjBJYuFBQ1q2JX7oxEkXb4jD"
BASE58 = base58.BITCOIN_ALPHABET.decode()


def identity(**change: Any) -> ModelIdentity:
    fields = {"model": "org/tiny", "config_hash": "ab" * 32, "revision": "12" * 20, "fingerprint": "cd" * 32}
    return ModelIdentity(**{**fields, **change})


def token(**change: Any) -> JoinToken:
    fields = {"swarm": "tiny-1", "model": "org/tiny", "identity": identity(), "peers": (PEER,)}
    return JoinToken(**{**fields, **change})


def fields_of(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = msgpack.unpackb(base58.b58decode_check(text.removeprefix("gp1")))
    return fields


def sealed(payload: object) -> str:
    """A token with a right checksum, whatever is in it."""
    data = payload if isinstance(payload, bytes) else msgpack.packb(payload)
    return "gp1" + base58.b58encode_check(data).decode()


HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
NAMES = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=128)
MODELS = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=60)
PEERS = st.lists(
    st.builds("/dns/{}/tcp/{}/p2p/{}".format, NAMES.map(lambda name: name[:40]), st.integers(1, 65535), NAMES),
    min_size=1,
    max_size=4,
)
IDENTITIES = st.builds(
    ModelIdentity,
    model=MODELS,
    config_hash=HEX,
    revision=st.none() | st.text("0123456789abcdef", min_size=7, max_size=64),
    fingerprint=st.none() | HEX,
)


@given(st.builds(JoinToken, swarm=NAMES, model=MODELS, identity=IDENTITIES, peers=PEERS.map(tuple)))
def test_survives_being_pasted(original: JoinToken) -> None:
    assert JoinToken.decode(original.encode()) == original


def test_line_breaks_of_a_terminal_do_no_harm() -> None:
    text = token().encode()
    wrapped = " \n".join(text[start : start + 40] for start in range(0, len(text), 40))
    assert JoinToken.decode(f"\t{wrapped}\n") == token()


def test_is_one_word_of_letters_and_digits() -> None:
    text = token().encode()
    assert text.isalnum()
    assert text.isascii()
    assert len(text) < 400


def test_the_largest_token_that_can_be_made_can_be_read() -> None:
    host = ".".join(["a" * 60] * 4)
    peers = tuple(
        f"/dns/{host}/tcp/{port}/p2p/12D3KooWAkxmPQg8FgoTvy7Wi2hWbjBJYuFBQ1q2JX7oxEkXb4jD" for port in range(8)
    )
    assert JoinToken.decode(token(peers=peers).encode()).peers == peers


def test_every_change_of_a_character_is_noticed() -> None:
    text = token().encode()
    for position, right in enumerate(text):
        step = 1 + position % (len(BASE58) - 1)
        for wrong in (BASE58[(BASE58.find(right) + step) % len(BASE58)], "0", "é"):
            if wrong != right:
                with pytest.raises(TokenError):
                    JoinToken.decode(text[:position] + wrong + text[position + 1 :])


def test_every_truncation_is_noticed() -> None:
    text = token().encode()
    for length in range(len(text)):
        for part in (text[:length], text[len(text) - length :]):
            with pytest.raises(TokenError):
                JoinToken.decode(part)


def test_lost_swapped_and_doubled_characters_are_noticed() -> None:
    text = token().encode()
    for position in range(len(text) - 1):
        pair = text[position : position + 2]
        for other in ("", pair[0], pair + pair[1], pair[::-1]):
            changed = text[:position] + other + text[position + 2 :]
            if changed != text:
                with pytest.raises(TokenError):
                    JoinToken.decode(changed)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a join token"),
        ("hello", "not a join token"),
        ("hf_aBcDeF", "not a join token"),
        ("gp1", "damaged or cut short"),
        ("gp11111", "damaged or cut short"),
        ("gp2", "damaged or cut short"),
        ("gp2" + "a" * 50, "damaged or cut short"),
        ("gp3" + "a" * 50, "another version"),
        ("gpx", "another version"),
        ("gp1" + "a" * 10_000, "not a join token"),
        ("gp1\x00\x00", "damaged or cut short"),
    ],
)
def test_the_error_says_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(TokenError, match=words):
        JoinToken.decode(text)


GOOD = fields_of(token().encode())


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x81",
        b"\x84\xa1s",
        b"\x80\x80",
        b"\xc7\x00\xff",
        b"\xd6\xff\xff\xff\xff\xff",
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xa1\xff",
        None,
        1,
        "s",
        [],
        ["s", "m", "p", "i"],
        {},
        {1: 2},
        {**GOOD, "s": 1},
        {**GOOD, "s": ""},
        {**GOOD, "s": "a b"},
        {**GOOD, "s": "a.b"},
        {**GOOD, "s": "a" * 129},
        {**GOOD, "s": ["tiny"]},
        {**GOOD, "m": None},
        {**GOOD, "m": b"tiny"},
        {**GOOD, "p": []},
        {**GOOD, "p": PEER},
        {**GOOD, "p": {PEER: 1}},
        {**GOOD, "p": [PEER] * 33},
        {**GOOD, "p": [1]},
        {**GOOD, "p": [None]},
        {**GOOD, "p": [[PEER]]},
        {**GOOD, "p": ["203.0.113.7:31330"]},
        {**GOOD, "i": None},
        {**GOOD, "i": []},
        {**GOOD, "i": "x"},
        {**GOOD, "i": {}},
        {**GOOD, "i": {**GOOD["i"], "config_hash": 1}},
        {**GOOD, "i": {**GOOD["i"], "config_hash": b"\x00"}},
        {**GOOD, "i": {**GOOD["i"], "model": []}},
        {**GOOD, "i": {**GOOD["i"], "extra": 1}},
        {key: value for key, value in GOOD.items() if key != "p"},
    ],
    ids=lambda payload: repr(payload)[:40],
)
def test_hostile_contents_are_refused(payload: object) -> None:
    with pytest.raises(TokenError):
        JoinToken.decode(sealed(payload))


def test_a_model_name_is_fit_to_be_printed() -> None:
    with pytest.raises(TokenError):
        JoinToken.decode(sealed({**GOOD, "m": "tiny\x1b[2J\nroot"}))


@settings(max_examples=300)
@given(st.binary(max_size=100))
def test_no_contents_do_more_than_be_refused(payload: bytes) -> None:
    with pytest.raises(TokenError):
        JoinToken.decode(sealed(payload))


@given(st.text(max_size=80))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    for guess in (text, "gp1" + text):
        with pytest.raises(TokenError):
            JoinToken.decode(guess)


def test_fields_of_later_minor_versions_are_passed_over() -> None:
    assert JoinToken.decode(sealed({**GOOD, "z": {"new": 1}})) == token()


@pytest.mark.parametrize(
    "change", [{"swarm": "a b"}, {"peers": ()}, {"peers": ("localhost",)}, {"peers": (PEER,) * 33}]
)
def test_a_wrong_token_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(TokenError):
        token(**change)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("/home/me/models/tiny.v1/", "tiny-v1"),
        ("tiny llama", "tiny-llama"),
        ("", "model"),
        ("/", "model"),
        ("ü" * 300, "-" * 128),
    ],
)
def test_a_swarm_is_named_after_its_model(model: str, name: str) -> None:
    assert swarm_name_for(model) == name
    token(swarm=name)
