"""Before anything is compared through a swarm: both releases of transformers compute the same from a checkpoint."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.interop.questions import NEW_TOKENS, TOKEN_QUESTIONS, ask
from tests.interop.stock_processes import StockClient


def test_the_stock_environment_is_the_one_of_2023(stock_client: StockClient) -> None:
    assert stock_client.do("versions") == {"transformers": "4.34.1", "petals": "2.2.0.post1"}


@pytest.mark.parametrize("question", ["logits", "many tokens", "long text", "input gradients"])
def test_local_models_compute_the_same_numbers(
    model: Path, local: PreTrainedModel, stock_client: StockClient, question: str
) -> None:
    theirs = torch.tensor(stock_client.do("ask", model={"directory": str(model)}, question=question))
    torch.testing.assert_close(torch.tensor(ask(local, question)), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("question", TOKEN_QUESTIONS)
def test_local_models_generate_the_same_tokens(
    model: Path, local: PreTrainedModel, stock_client: StockClient, question: str
) -> None:
    ours = ask(local, question)
    assert ours == stock_client.do("ask", model={"directory": str(model)}, question=question)
    assert all(len(row) == NEW_TOKENS for row in ours)
    assert len({token for row in ours for token in row}) > 1
