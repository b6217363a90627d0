"""What single tokens are told to be."""

from geopetals.gateway.answers import Chat, Completions
from geopetals.gateway.generation import Delta
from geopetals.gateway.sampler import Chosen
from geopetals.gateway.token_names import Names
from tests.gateway.fakes import Bytes


class ByteLevel:
    """As GPT-2 names them: half of an é, and a space."""

    def decode(self, tokens: list[int], **_: object) -> str:
        return {0: "\ufffd", 1: " a", 2: "\ufffd"}[tokens[0]]

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return ["Ã", "Ġa", None][token]


def test_bytes_are_the_tokens_own_where_it_tells() -> None:
    assert [Names(ByteLevel()).raw(token) for token in range(3)] == [b"\xc3", b" a", "\ufffd".encode()]
    assert Names(Bytes()).raw(0xE9) == b"\xe9"
    chunk = Chat("m", Names(Bytes()), logprobs=True).chunk(0, Delta(text="", chosen=(Chosen(0xE9, -1.0),)))
    assert chunk["choices"][0]["logprobs"]["content"][0]["bytes"] == [0xE9]


def test_of_tokens_that_read_alike_the_likeliest_is_told() -> None:
    chosen = Chosen(0xE9, -1.0, ((0xE9, -1.0), (0xE8, -2.0), (0x41, -3.0)))
    chunk = Completions("m", Names(Bytes()), logprobs=True).chunk(0, Delta(text="", chosen=(chosen,)))
    assert chunk["choices"][0]["logprobs"]["top_logprobs"] == [{"\ufffd": -1.0, "A": -3.0}]
