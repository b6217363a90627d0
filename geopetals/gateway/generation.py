"""One answer of the model, made in a thread, as a stream of deltas."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from geopetals.client.model import DistributedModel
from geopetals.client.runtime import Interruption
from geopetals.errors import SwarmFailure
from geopetals.gateway.sampler import Chosen, Sampler, Sampling
from geopetals.gateway.text import Detokenizer, StopScanner

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be generated: token ids of the prompt, at most so many more, and how."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What came since the last one. `chosen` lists its tokens; `finish_reason` is set in the last one."""

    text: str
    chosen: tuple[Chosen, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class _Written:
    """The answer so far, and what of it has not been shown."""

    detokenizer: Detokenizer
    scanner: StopScanner
    eos: frozenset[int]
    tokens: int = 0
    pending: list[Chosen] = field(default_factory=list)
    is_over: bool = False


class Generation:
    """Deltas come out of `deltas()` on the event loop; `run()` makes them in another thread; `cancel()` is for both."""

    def __init__(self, order: Order, model: DistributedModel, tokenizer: Any, eos: frozenset[int]) -> None:
        """`eos`: tokens that end an answer."""
        self.order = order
        self.tokens = 0
        self._model, self._tokenizer, self._eos = model, tokenizer, eos
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._interruption = Interruption()

    def cancel(self) -> None:
        """End it now, whatever it waits for; what it holds is freed. Never waits."""
        self._cancelled.set()
        self._interruption.interrupt()

    async def deltas(self) -> AsyncIterator[Delta]:
        """Raises what `run()` raised, and SwarmFailure if that came to no end."""
        while True:
            item = await self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if item.finish_reason is not None:
                return

    def run(self) -> None:
        """Generate to the end; frees the cache on the servers in any case."""
        try:
            if not self._cancelled.is_set():
                self._generate()
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever reads the deltas
            if not self._cancelled.is_set():
                self._put(error)
                return
        self._put(SwarmFailure("the answer was ended before it was complete: ask again."))

    def _generate(self) -> None:
        order = self.order
        written = _Written(Detokenizer(self._decode, order.prompt), StopScanner(order.stops), self._eos)
        ids = torch.tensor([order.prompt], device=self._model.device)
        length = len(order.prompt) + order.max_tokens
        # The session is closed outside of the interruption: that is how its cache is freed.
        with (
            self._model.inference_session(max_length=length, output_tokens=order.max_tokens) as session,
            self._interruption.active(),
        ):
            self._model.generate(
                ids,
                session=session,
                generation_config=self._config(written.eos),
                logits_processor=[Sampler(order.sampling, lambda chosen: self._take(chosen, written))],
                stopping_criteria=StoppingCriteriaList([_Over(lambda: written.is_over or self._cancelled.is_set())]),
            )

    def _config(self, eos: frozenset[int]) -> GenerationConfig:
        """A request says how it wants to be answered. What is None here comes from the model's own settings."""
        return GenerationConfig(
            max_new_tokens=self.order.max_tokens,
            do_sample=False,
            eos_token_id=sorted(eos) or None,
            pad_token_id=min(eos, default=0),
        )

    def _take(self, chosen: Chosen, written: _Written) -> None:
        """A token was chosen: show what it completes."""
        if written.is_over or self._cancelled.is_set():
            return
        written.tokens += 1
        self.tokens = written.tokens
        finish: FinishReason | None = None
        if chosen.token in written.eos:
            finish = "stop"
            text = written.scanner.add(written.detokenizer.end())
        else:
            written.pending.append(chosen)
            text = written.scanner.add(written.detokenizer.add(chosen.token))
            if not written.scanner.is_found and written.tokens >= self.order.max_tokens:
                text += written.scanner.add(written.detokenizer.end())
                finish = "length"
        if written.scanner.is_found:
            finish = "stop"
        elif finish is not None:
            text += written.scanner.end()
        written.is_over = finish is not None
        if text or finish is not None:
            shown, written.pending = tuple(written.pending), []
            self._put(Delta(text=text, chosen=shown, finish_reason=finish))

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _put(self, item: Delta | BaseException) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


class _Over(StoppingCriteria):
    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._is_over(), dtype=torch.bool, device=input_ids.device)


def eos_tokens(model: DistributedModel, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: chat models often have several."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    known = configured if isinstance(configured, list) else [configured]
    return {token for token in (*known, tokenizer.eos_token_id) if token is not None}
