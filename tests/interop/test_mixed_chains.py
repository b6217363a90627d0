"""Chains of a stock server and a GeoPETALS server, in both orders, used by both clients."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.interop.conftest import OurClients
from tests.interop.mixed_swarm import OURS, STOCK, MixedSwarm
from tests.interop.questions import NEW_TOKENS, TOKEN_QUESTIONS, ask
from tests.interop.stock_processes import StockClient, wait_for

both_orders = pytest.mark.parametrize("kinds", [(STOCK, OURS), (OURS, STOCK)], ids=" then ".join)


@both_orders
@pytest.mark.parametrize("question", TOKEN_QUESTIONS)
def test_a_stock_client_generates_the_tokens_of_the_local_model(
    swarm: MixedSwarm, local: PreTrainedModel, stock_client: StockClient, kinds: tuple[str, str], question: str
) -> None:
    with stock_client.without_complaints(but_at_the_end=True):
        answer = stock_client.do("ask", model=swarm.stock_model(kinds), question=question)
    assert answer == ask(local, question)


@both_orders
@pytest.mark.parametrize("question", TOKEN_QUESTIONS)
def test_our_client_generates_the_tokens_of_the_local_model(
    our_clients: OurClients, local: PreTrainedModel, kinds: tuple[str, str], question: str
) -> None:
    assert ask(our_clients.on(kinds), question) == ask(local, question)


@both_orders
def test_gradients_of_a_stock_client_pass_through_both_kinds(
    swarm: MixedSwarm, local: PreTrainedModel, stock_client: StockClient, kinds: tuple[str, str]
) -> None:
    with stock_client.without_complaints(but_at_the_end=True):
        answer = stock_client.do("ask", model=swarm.stock_model(kinds), question="input gradients")
    expected = torch.tensor(ask(local, "input gradients"))
    torch.testing.assert_close(torch.tensor(answer), expected, rtol=1e-4, atol=1e-5)


@both_orders
def test_a_chain_is_the_one_asked_for(
    swarm: MixedSwarm, our_clients: OurClients, stock_client: StockClient, kinds: tuple[str, str]
) -> None:
    with our_clients.on(kinds).inference_session(max_length=8) as session:
        session.open(1)
        assert tuple(hop.peer_id for hop in session.route) == swarm.chain(kinds)
    with stock_client.without_complaints(but_at_the_end=True):
        route = stock_client.do("hold", model=swarm.stock_model(kinds), max_length=8)
        stock_client.do("release")
    assert tuple(peer_id for peer_id, _, _ in route) == swarm.chain(kinds)


def test_our_server_pushes_to_a_stock_server(swarm: MixedSwarm, stock_client: StockClient) -> None:
    """As the stock client asks for from its second step on; stock servers themselves never do."""
    log = swarm.stock_logs[1]
    before = _pushes(log)
    with stock_client.without_complaints(but_at_the_end=True):
        stock_client.do("ask", model=swarm.stock_model((OURS, STOCK)), question="greedy")
    wait_for(lambda: _pushes(log) - before >= NEW_TOKENS - 1 or None, "pushed steps", 5.0)


def _pushes(log: Path) -> int:
    return log.read_text(errors="replace").count("rpc_push(blocks=3:6")
