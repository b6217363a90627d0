"""Choosing tokens as a request wants it, with a random generator of its own: other requests do not matter."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from geopetals.errors import SwarmFailure

_GREEDY_BELOW = 1e-5
"""Of temperatures: logits over such a small one overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Temperature 0, and hardly more, is greedy. `seed` None: another one each time. `logprobs`: how many alternatives
    to name.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token, and if asked for its log-probability (natural, before temperature) and those of the likeliest tokens."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler(LogitsProcessor):
    """Chooses the token itself and leaves generate() only that one. For one sequence; `on_token` hears of each.

    Penalties are OpenAI's: subtracted from the logits of tokens that the answer has already. Raises SwarmFailure for
    logits that are no numbers.
    """

    def __init__(self, sampling: Sampling, on_token: Callable[[Chosen], None]) -> None:
        self._sampling, self._on_token = sampling, on_token
        self._counts: Tensor | None = None
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed % 2**63)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores[0].float().cpu()
        if not bool(logits.max().isfinite()):  # one that is no number is the maximum
            raise SwarmFailure("the swarm has computed values that are no numbers: try again, another chain may do it.")
        chosen = self._choose(logits)
        result = torch.full_like(scores, -torch.inf)
        result[0, chosen] = 0.0
        self._on_token(self._describe(chosen, logits))
        return result

    def _choose(self, logits: Tensor) -> int:
        temperature, penalised = self._sampling.temperature, self._penalised(logits)
        token = int(penalised.argmax()) if temperature < _GREEDY_BELOW else self._draw(penalised / temperature)
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def _penalised(self, logits: Tensor) -> Tensor:
        sampling = self._sampling
        if not (sampling.presence_penalty or sampling.frequency_penalty):
            return logits
        if self._counts is None:
            self._counts = torch.zeros_like(logits)
        return logits - sampling.frequency_penalty * self._counts - sampling.presence_penalty * (self._counts > 0)

    def _draw(self, logits: Tensor) -> int:
        probabilities = logits.softmax(dim=-1)
        if self._sampling.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            before = ordered.cumsum(dim=-1) - ordered
            probabilities = torch.zeros_like(probabilities)
            probabilities[order] = ordered * (before < self._sampling.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._random))

    def _describe(self, token: int, logits: Tensor) -> Chosen:
        if self._sampling.logprobs is None:
            return Chosen(token)
        logprobs = logits.log_softmax(dim=-1)
        values, tokens = logprobs.topk(self._sampling.logprobs)
        return Chosen(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
