"""Text of an answer as its tokens come: whole characters only, and nothing of a stop text."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_UNFINISHED = "\ufffd"
_PROMPT_TOKENS = 6


class Detokenizer:
    """Tokens to text, piece by piece. A token may be part of a character, and spaces depend on the token before."""

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        """`prompt`: what the text goes on from; without it some tokenizers drop a space at the beginning."""
        self._decode = decode
        self._tokens = list(prompt[-_PROMPT_TOKENS:])
        if decode(self._tokens).endswith(_UNFINISHED):
            self._tokens = []
        self._context, self._shown = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """The text that this token completes, often all of its own, sometimes nothing."""
        self._tokens.append(token)
        return self._new_text(last=False)

    def end(self) -> str:
        """What is left, even if it is half a character."""
        return self._new_text(last=True)

    def _new_text(self, *, last: bool) -> str:
        known = self._decode(self._tokens[self._context : self._shown])
        text = self._decode(self._tokens[self._context :])
        if len(text) <= len(known) or (text.endswith(_UNFINISHED) and not last):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return text[len(known) :]


class StopScanner:
    """Text up to the first of some texts. What may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_found = False

    def add(self, text: str) -> str:
        """What can be shown now; nothing any more once a stop text is found."""
        if self.is_found:
            return ""
        self._held += text
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.is_found = True
            shown, self._held = self._held[: min(ends)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def end(self) -> str:
        """What was held back for nothing."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
