"""Answers in OpenAI's words: chat and completions, whole or as chunks."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from geopetals.gateway.generation import Delta, FinishReason, Order
from geopetals.gateway.sampler import Chosen


class TokenNames(Protocol):
    """What a token is called in lists of probabilities."""

    def text(self, token: int) -> str: ...

    def raw(self, token: int) -> bytes:
        """Its bytes, which may be a part of a character."""


@dataclass(slots=True)
class Choice:
    """One answer as it has come so far."""

    text: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.chosen += delta.chosen
        self.finish_reason = delta.finish_reason


def usage(orders: Sequence[Order], generated: int, *, choices: int) -> dict[str, int]:
    """A prompt is counted once, however many choices (`choices` each) are made of it."""
    prompt = sum(len(order.prompt) for order in orders[::choices])
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


class Chat:
    """Bodies of /v1/chat/completions."""

    def __init__(self, model: str, names: TokenNames, *, logprobs: bool) -> None:
        self._head = _head("chatcmpl", model)
        self._names, self._logprobs = names, logprobs

    def whole(self, choices: Sequence[Choice], used: dict[str, int]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._of(choice.chosen),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": used,
        }

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Says who speaks, before any word."""
        return self._chunk(index, {"role": "assistant", "content": ""}, (), None)

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text or delta.finish_reason is None else {}
        return self._chunk(index, content, delta.chosen, delta.finish_reason)

    def last_chunk(self, used: dict[str, int]) -> dict[str, Any]:
        """The one that counts tokens."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": used}

    def _chunk(
        self, index: int, delta: dict[str, str], chosen: Sequence[Chosen], finish: FinishReason | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": self._of(chosen), "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _of(self, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = []
        for each in chosen:
            top = [self._named(token, logprob) for token, logprob in each.top]
            content.append({**self._named(each.token, each.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._names.text(token), "logprob": logprob, "bytes": list(self._names.raw(token))}


class Completions:
    """Bodies of /v1/completions."""

    def __init__(self, model: str, names: TokenNames, *, logprobs: bool) -> None:
        self._head = {**_head("cmpl", model), "object": "text_completion"}
        self._names, self._logprobs = names, logprobs
        self._offsets: dict[int, int] = {}

    def whole(self, choices: Sequence[Choice], used: dict[str, int]) -> dict[str, Any]:
        listed = [
            self._choice(index, choice.text, choice.chosen, choice.finish_reason)
            for index, choice in enumerate(choices)
        ]
        return {**self._head, "choices": listed, "usage": used}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """There is none."""
        return None

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        return {**self._head, "choices": [self._choice(index, delta.text, delta.chosen, delta.finish_reason)]}

    def last_chunk(self, used: dict[str, int]) -> dict[str, Any]:
        """The one that counts tokens."""
        return {**self._head, "choices": [], "usage": used}

    def _choice(self, index: int, text: str, chosen: Sequence[Chosen], finish: FinishReason | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._of(index, chosen), "finish_reason": finish}

    def _of(self, index: int, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        texts = [self._names.text(each.token) for each in chosen]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in chosen],
            "top_logprobs": [self._top(each) for each in chosen],
            "text_offset": offsets,
        }

    def _top(self, chosen: Chosen) -> dict[str, float]:
        """Of tokens that read alike the likeliest."""
        found: dict[str, float] = {}
        for token, logprob in chosen.top:
            found.setdefault(self._names.text(token), logprob)
        return found


def _head(prefix: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
