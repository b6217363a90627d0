"""Requests to generations: prompts become tokens, limits are checked, and only so many run at a time."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from geopetals import metrics
from geopetals.client.model import DistributedModel
from geopetals.errors import GeoPetalsError, SwarmFailure
from geopetals.gateway.errors import ApiError, api_error
from geopetals.gateway.generation import Delta, Generation, Order, eos_tokens
from geopetals.gateway.requests import AnyRequest, ChatRequest
from geopetals.gateway.sampler import Sampling
from geopetals.gateway.token_names import Names

_NEWEST = 0.2
_UNKNOWN_S = 10.0
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`running` answers are made at a time, `waiting` more wait. `tokens`: of one whose request names no limit."""

    running: int = 16
    waiting: int = 64
    tokens: int = 1024
    body_bytes: int = 2 * 2**20


class Engine:
    """The model behind the API. Lives on the event loop; generates in threads."""

    def __init__(self, model: DistributedModel, tokenizer: Any, *, names: Sequence[str], limits: Limits) -> None:
        """The model's own generation settings are put aside: a request says how it wants to be answered."""
        self.names, self.limits = tuple(names), limits
        self.token_names = Names(tokenizer)
        self.started_at = int(time.time())
        self._model, self._tokenizer = model, tokenizer
        self._eos = frozenset(eos_tokens(model, tokenizer))
        model.generation_config = GenerationConfig()  # generate() fills what a request leaves open from it
        self._generations: set[Generation] = set()
        self._is_ending = False
        self._threads = ThreadPoolExecutor(limits.running, thread_name_prefix="generation")
        self._encoding = threading.Lock()  # fast tokenizers refuse to be used by two threads at once
        self._places = asyncio.Semaphore(limits.running)
        self._seconds_each: float | None = None
        self.running = self.waiting = 0
        metrics.watch_requests(running=lambda: self.running, waiting=lambda: self.waiting)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def give_up(self) -> None:
        """End all answers with an error, those that wait for a place too."""
        self._is_ending = True
        for generation in self._generations:
            generation.cancel()

    async def health(self) -> None:
        """Raises ApiError while no chain of servers covers the model."""
        try:
            await asyncio.to_thread(lambda: self._model.swarm.run(self._model.swarm.chain_async()))
        except GeoPetalsError as error:
            raise api_error(error) from error

    def orders(self, request: AnyRequest) -> list[Order]:
        """One for each choice of the answer, in the order of their indices. Raises ApiError."""
        if request.model not in self.names:
            raise ApiError(404, f"there is no model {request.model!r} here.", param="model", code="model_not_found")
        prompts = [self._chat(request)] if isinstance(request, ChatRequest) else self._completions(request.prompts)
        return [
            Order(
                prompt=tuple(prompt),
                max_tokens=self._allowed(len(prompt), request),
                sampling=_sampling(request, number),
                stops=request.stops,
            )
            for prompt in prompts
            for number in range(request.n)
        ]

    @contextlib.asynccontextmanager
    async def generate(self, order: Order) -> AsyncIterator[Generation]:
        """Waits for a place. The generation is cancelled, and its cache freed, when the block is left."""
        generation = Generation(order, self._model, self._tokenizer, self._eos)
        async with self._place():
            if self._is_ending:
                raise api_error(SwarmFailure("the gateway is being stopped: ask again later, or another one."))
            self._generations.add(generation)
            began = time.monotonic()
            task = asyncio.get_running_loop().run_in_executor(self._threads, generation.run)
            try:
                yield generation
            finally:
                generation.cancel()
                self._generations.discard(generation)
                await asyncio.shield(task)  # the place is free when the thread is
                self._note(time.monotonic() - began)

    async def deltas(self, generation: Generation) -> AsyncIterator[Delta]:
        """The generation's, with failures of the swarm as ApiError; counts what is asked of the metrics."""
        began = time.monotonic()
        try:
            async for delta in generation.deltas():
                yield delta
                if delta.finish_reason is not None:
                    metrics.REQUEST_SUCCESS.labels(delta.finish_reason).inc()
                    metrics.REQUEST_SECONDS.observe(time.monotonic() - began)
        except GeoPetalsError as error:
            raise api_error(error) from error
        finally:
            metrics.PROMPT_TOKENS.inc(len(generation.order.prompt))
            metrics.GENERATION_TOKENS.inc(generation.tokens)

    def require_room(self, choices: int) -> None:
        """Raises ApiError: 429 that says when to come again, 400 where no waiting helps."""
        most = max(self.limits.running, self.limits.waiting)
        if choices > most:
            raise ApiError(400, f"{choices} answers are more than the {most} that are taken here.", param="n")
        if self.waiting + choices <= self.limits.waiting or (
            self.running + choices <= self.limits.running and not self.waiting
        ):
            return
        each_s = _UNKNOWN_S if self._seconds_each is None else self._seconds_each
        wait_s = each_s * (self.waiting + self.running) / self.limits.running
        raise ApiError(
            429,
            f"{self.running} answers are being made and {self.waiting} wait: come again later.",
            code="too_many_requests",
            retry_after_s=wait_s,
        )

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        began = time.monotonic()
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
            metrics.REQUEST_QUEUE.observe(time.monotonic() - began)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()

    def _note(self, seconds: float) -> None:
        known = seconds if self._seconds_each is None else self._seconds_each
        self._seconds_each = known + _NEWEST * (seconds - known)

    def _chat(self, request: ChatRequest) -> list[int]:
        if not self._tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template: use /v1/completions.", param="messages")
        messages = [message.plain() for message in request.messages]
        try:
            with self._encoding:
                encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # templates are programs that refuse an order of roles by raising what they like
            raise ApiError(400, f"the model's chat template refuses this: {error}"[:300], param="messages") from error
        ids: list[int] = encoded["input_ids"]
        return ids

    def _completions(self, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
        embedding: Any = self._model.get_input_embeddings()
        vocabulary = int(embedding.weight.shape[0])
        found = []
        for prompt in prompts:
            with self._encoding:
                ids = self._tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
            if not ids:
                raise ApiError(400, "the prompt is empty: give at least one token.", param="prompt")
            if max(ids) >= vocabulary:
                raise ApiError(400, f"token {max(ids)} is not one of the model's {vocabulary}.", param="prompt")
            found.append(ids)
        return found

    def _allowed(self, prompt_tokens: int, request: AnyRequest) -> int:
        """Tokens to generate at most. Raises ApiError if the model's context is too short."""
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        context = context_tokens(self._model)
        left = context - prompt_tokens
        if left < 1 or (request.limit is not None and request.limit > left):
            wanted = "" if request.limit is None else f" and {request.limit} to generate"
            raise ApiError(
                400,
                f"the model's context is {context} tokens: {prompt_tokens} of the prompt{wanted} are too many.",
                param=field if left < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        return min(left, self.limits.tokens) if request.limit is None else request.limit


def context_tokens(model: DistributedModel) -> int:
    """Prompt and answer together, as the model's configuration has it; a million where it has no limit."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in _LENGTHS)
    return min((length for length in found if isinstance(length, int) and length > 0), default=2**20)


def _sampling(request: AnyRequest, number: int) -> Sampling:
    return Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        seed=None if request.seed is None else request.seed + number,
        logprobs=request.num_logprobs,
    )
