"""A GeoPETALS client on two stock PETALS servers."""

import pytest
import torch
from transformers import PreTrainedModel

from geopetals.client import pass_calls
from geopetals.errors import ServerFull
from tests.interop.conftest import OurClients
from tests.interop.mixed_swarm import SPANS, STOCK, MixedSwarm
from tests.interop.questions import DEEP_PROMPTS, TOKEN_QUESTIONS, ask
from tests.interop.stock_processes import STOCK_CACHE_TOKENS, StockClient

STOCK_CHAIN = (STOCK, STOCK)


@pytest.mark.parametrize("question", TOKEN_QUESTIONS)
def test_it_generates_the_tokens_of_the_local_model(
    our_clients: OurClients, local: PreTrainedModel, question: str
) -> None:
    assert ask(our_clients.on(STOCK_CHAIN), question) == ask(local, question)


@pytest.mark.parametrize("question", ["logits", "many tokens", "input gradients"])
def test_it_computes_and_differentiates_without_a_session(
    our_clients: OurClients, local: PreTrainedModel, question: str
) -> None:
    answer = torch.tensor(ask(our_clients.on(STOCK_CHAIN), question))
    torch.testing.assert_close(answer, torch.tensor(ask(local, question)), rtol=1e-4, atol=1e-5)


def test_it_sends_long_inputs_as_streams(
    our_clients: OurClients, local: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_calls, "UNARY_LIMIT_BYTES", 100)
    answer = torch.tensor(ask(our_clients.on(STOCK_CHAIN), "logits"))
    torch.testing.assert_close(answer, torch.tensor(ask(local, "logits")), rtol=1e-4, atol=1e-5)


def test_it_trains_deep_prompts_as_a_stock_client(
    swarm: MixedSwarm, our_clients: OurClients, stock_client: StockClient
) -> None:
    question = "deep prompt gradients"
    ours = ask(our_clients.on(STOCK_CHAIN, **DEEP_PROMPTS), question)
    theirs = stock_client.do("ask", model=swarm.stock_model(STOCK_CHAIN, **DEEP_PROMPTS), question=question)
    for ours_of_table, theirs_of_table in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(ours_of_table), torch.tensor(theirs_of_table), rtol=1e-4, atol=1e-5)


def test_its_session_runs_on_both_servers_and_frees_their_caches(swarm: MixedSwarm, our_clients: OurClients) -> None:
    servers = swarm.peer_ids[STOCK]
    free = [swarm.observer.free_cache(peer_id) for peer_id in servers]
    with our_clients.on(STOCK_CHAIN).inference_session(max_length=40) as session:
        session.open(1)
        assert [(h.peer_id, (h.start, h.end)) for h in session.route] == list(zip(servers, SPANS, strict=True))
        assert all(swarm.observer.free_cache(p) < before for p, before in zip(servers, free, strict=True))
    for peer_id, before in zip(servers, free, strict=True):
        swarm.observer.wait_for_free_cache(peer_id, before)


def test_it_tells_a_full_server_from_one_that_is_gone(our_clients: OurClients) -> None:
    model = our_clients.on(STOCK_CHAIN, full_timeout=0.5)
    with model.inference_session(max_length=STOCK_CACHE_TOKENS) as first:
        first.open(1)
        with pytest.raises(ServerFull), model.inference_session(max_length=STOCK_CACHE_TOKENS) as second:
            second.open(1)
