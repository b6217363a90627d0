"""A stock PETALS client, which pushes from server to server by default, on two GeoPETALS servers."""

import pytest
import torch
from transformers import PreTrainedModel

from tests.interop.mixed_swarm import KV_CACHE_TOKENS, OURS, SPANS, STOCK, MixedSwarm
from tests.interop.questions import DEEP_PROMPTS, TOKEN_QUESTIONS, ask
from tests.interop.stock_processes import StockClient

OUR_CHAIN = (OURS, OURS)


@pytest.mark.parametrize("question", TOKEN_QUESTIONS)
def test_it_generates_the_tokens_of_the_local_model(
    swarm: MixedSwarm, local: PreTrainedModel, stock_client: StockClient, question: str
) -> None:
    with stock_client.without_complaints():
        answer = stock_client.do("ask", model=swarm.stock_model(OUR_CHAIN), question=question)
    assert answer == ask(local, question)


def test_the_end_of_its_session_frees_the_cache_and_breaks_no_pipe(
    swarm: MixedSwarm, stock_client: StockClient
) -> None:
    servers = swarm.peer_ids[OURS]
    free = [swarm.observer.free_cache(peer_id) for peer_id in servers]
    max_length = 40
    with stock_client.without_complaints():
        route = stock_client.do("hold", model=swarm.stock_model(OUR_CHAIN), max_length=max_length)
        assert route == [[peer_id, *span] for peer_id, span in zip(servers, SPANS, strict=True)]
        for peer_id, before, (start, end) in zip(servers, free, SPANS, strict=True):
            assert swarm.observer.free_cache(peer_id) == before - max_length * (end - start)
        stock_client.do("release")
        for peer_id, before in zip(servers, free, strict=True):
            swarm.observer.wait_for_free_cache(peer_id, before)


def test_it_knows_how_much_cache_a_server_has_left(swarm: MixedSwarm, stock_client: StockClient) -> None:
    """A server with enough cache must not look full, which costs it 10 seconds in the client's routing."""
    model = swarm.stock_model(OUR_CHAIN)
    assert stock_client.do("has_cache_for", model=model, tokens=KV_CACHE_TOKENS // 2) == [True, True]
    assert stock_client.do("has_cache_for", model=model, tokens=KV_CACHE_TOKENS + 1) == [False, False]


@pytest.mark.parametrize("question", ["logits", "many tokens", "long text", "input gradients"])
def test_it_computes_and_differentiates_without_a_session(
    swarm: MixedSwarm, local: PreTrainedModel, stock_client: StockClient, question: str
) -> None:
    with stock_client.without_complaints():
        answer = stock_client.do("ask", model=swarm.stock_model(OUR_CHAIN), question=question)
    torch.testing.assert_close(torch.tensor(answer), torch.tensor(ask(local, question)), rtol=1e-4, atol=1e-5)


def test_it_trains_deep_prompts_as_on_stock_servers(swarm: MixedSwarm, stock_client: StockClient) -> None:
    with stock_client.without_complaints():
        ours, theirs = (
            stock_client.do("ask", model=swarm.stock_model(kinds, **DEEP_PROMPTS), question="deep prompt gradients")
            for kinds in (OUR_CHAIN, (STOCK, STOCK))
        )
    for ours_of_table, theirs_of_table in zip(ours, theirs, strict=True):
        expected = torch.tensor(theirs_of_table)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(torch.tensor(ours_of_table), expected, rtol=1e-4, atol=1e-5)
