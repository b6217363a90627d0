"""Showing an answer while it is made, and timing it as its reader would."""

import time
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from geopetals.errors import UnsupportedInput


class Stopwatch(TextStreamer):
    """A streamer that prints words as they are complete (or nothing) and keeps TTFT and tokens per second.

    The clock starts when it is made. `tokens_per_s` counts the tokens after the first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, echo: TextIO | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._echo = echo
        self._began = time.perf_counter()
        self._times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._times.append(time.perf_counter() - self._began)
        self._prompt_seen = True
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._echo is not None:
            self._echo.write(text + ("\n" if stream_end else ""))
            self._echo.flush()

    def figures(self) -> dict[str, float | int | None]:
        """`ttft_s`, `tokens_per_s` and `num_tokens`; None where there were too few tokens."""
        ttft_s = self._times[0] if self._times else None
        span_s = self._times[-1] - self._times[0] if len(self._times) > 1 else None
        rate = (len(self._times) - 1) / span_s if span_s else None
        return {"ttft_s": ttft_s, "tokens_per_s": rate, "num_tokens": len(self._times)}


def prompt_ids(tokenizer: Any, text: str, *, chat: bool) -> torch.Tensor:
    """Token ids [1, tokens] of a prompt, or of a first chat message by the model's template."""
    ids = (
        chat_ids(tokenizer, [{"role": "user", "content": text}])
        if chat
        else tokenizer(text, return_tensors="pt").input_ids
    )
    if ids.shape[1] == 0:
        raise UnsupportedInput("the prompt is empty: give at least one word.")
    tensor: torch.Tensor = ids
    return tensor


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    """Token ids [1, tokens] of a conversation whose next speaker is the model."""
    if not tokenizer.chat_template:
        raise UnsupportedInput("this model has no chat template: use `geopetals generate` without --chat.")
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids: torch.Tensor = encoded["input_ids"]
    return ids
