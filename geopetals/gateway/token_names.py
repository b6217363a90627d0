"""What single tokens are as text and as bytes: many are a part of a character, which no text can show."""

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNFINISHED = "\ufffd"


class Names:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text

    def raw(self, token: int) -> bytes:
        """The token's own bytes, where its name tells them; otherwise those of its text."""
        text, name = self.text(token), self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return text.encode()
        if (byte := _BYTE.fullmatch(name)) is not None:
            return bytes([int(byte[1], 16)])
        if _UNFINISHED in text and all(character in _BYTES for character in name):
            return bytes(_BYTES[character] for character in name)
        return text.encode()


def _byte_names() -> dict[str, int]:
    """Byte-level BPE names a byte by the character of its number if that can be seen, the others from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    names = {chr(byte): byte for byte in seen}
    others = (byte for byte in range(256) if byte not in seen)
    return names | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_names()
