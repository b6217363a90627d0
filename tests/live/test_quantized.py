"""Servers that hold their blocks in 8 or 4 bits, as an operator starts them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from geopetals.swarm.local import LocalSwarm
from geopetals.swarm.quantization import quantization_config
from tests.live.conftest import TWO_STAGES, Connect
from tests.models import VOCABULARY

pytestmark = pytest.mark.live


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_tokens_equal_the_quantized_local_model(llama: Path, connect: Connect, quantization: str) -> None:
    local: Any = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.float32, quantization_config=quantization_config(quantization, torch.float32)
    )
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    expected = local.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    with LocalSwarm(str(llama), quantization=quantization) as swarm:
        model = connect(llama, join=swarm.start(spans=TWO_STAGES).token)
        assert model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False).tolist() == expected.tolist()
        held = sum(server.weights_bytes for server in swarm.servers)
        model.close()
    full = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_pretrained(llama).model.layers.parameters())
    assert held < 0.5 * full * 7 / 6  # seven blocks on two servers
