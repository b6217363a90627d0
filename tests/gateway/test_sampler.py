"""The distribution of what is sampled, penalties, and the probabilities that are told."""

import math

import pytest
import torch

from geopetals.errors import SwarmFailure
from geopetals.gateway.sampler import Chosen, Sampler, Sampling

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def draw(sampling: Sampling, times: int, logits: torch.Tensor = LOGITS) -> list[Chosen]:
    found: list[Chosen] = []
    sampler = Sampler(sampling, found.append)
    for _ in range(times):
        left = sampler(torch.zeros(1, 1, dtype=torch.long), logits)
        assert int(left.argmax()) == found[-1].token
        assert int(left.isfinite().sum()) == 1
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_probabilities(temperature: float) -> None:
    tokens = torch.tensor([each.token for each in draw(Sampling(temperature=temperature, seed=0), 4000)])
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    assert torch.allclose(shares, (LOGITS[0] / temperature).softmax(0), atol=0.03)


def test_top_p_keeps_the_likeliest_that_reach_it() -> None:
    three = float(LOGITS[0].softmax(0)[:3].sum())  # 0.64, 0.24, 0.09, 0.03
    assert {each.token for each in draw(Sampling(top_p=0.6, seed=0), 500)} == {0}
    assert {each.token for each in draw(Sampling(top_p=0.7, seed=0), 500)} == {0, 1}
    assert {each.token for each in draw(Sampling(top_p=three - 0.01, seed=0), 2000)} == {
        0,
        1,
        2,
    }


def test_greedy_takes_the_likeliest_until_penalties_make_it_another() -> None:
    assert [each.token for each in draw(Sampling(temperature=0), 3)] == [0, 0, 0]
    assert [each.token for each in draw(Sampling(temperature=0, frequency_penalty=0.6), 4)] == [0, 0, 1, 0]
    assert [each.token for each in draw(Sampling(temperature=0, presence_penalty=1.5), 3)] == [0, 1, 0]


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    def tokens(seed: int | None) -> list[int]:
        return [each.token for each in draw(Sampling(seed=seed), 50)]

    assert tokens(-5) == tokens(-5)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


def test_probabilities_are_the_models_whatever_the_temperature() -> None:
    (chosen,) = draw(Sampling(temperature=0, logprobs=2, presence_penalty=1.0), 1)
    expected = LOGITS[0].log_softmax(0)
    assert chosen.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in chosen.top] == [0, 1]
    assert math.exp(chosen.top[1][1]) == pytest.approx(float(expected[1].exp()))
    (bare,) = draw(Sampling(logprobs=None), 1)
    assert bare.logprob is None


@pytest.mark.parametrize("temperature", [1e-40, 1e-9])
def test_hardly_any_temperature_is_greedy(temperature: float) -> None:
    assert {each.token for each in draw(Sampling(temperature=temperature), 20)} == {0}


@pytest.mark.parametrize("values", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_logits_that_are_no_numbers_are_a_failure_of_the_swarm(values: list[float]) -> None:
    with pytest.raises(SwarmFailure, match="no numbers"):
        draw(Sampling(), 1, torch.tensor([values]))
