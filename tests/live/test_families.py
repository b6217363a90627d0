"""Families of models through swarms of processes: greedy, seeded sampling and beams, in batches of one and of three."""

from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.swarm.local import LocalSwarm
from tests.families import relative_error, save_tiny, tiny_config
from tests.live.conftest import Connect
from tests.models import VOCABULARY

pytestmark = pytest.mark.live

# Rotary, ALiBi and learned positions, sliding windows, experts, parallel attention, soft caps.
FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "mistral", "gemma2", "gemma3_text", "phi3", "falcon", "gpt2", "bloom")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
}
NEW_TOKENS = 10


def tokens(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> list[list[int]]:
    torch.manual_seed(11)
    found: list[list[int]] = model.generate(
        ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options
    ).tolist()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_swarm_answers_as_the_local_model(family: str, tmp_path: Path, connect: Connect) -> None:
    local: Any = save_tiny(tmp_path, tiny_config(family))
    blocks = local.config.num_hidden_layers
    spans = [(0, blocks // 2), (blocks // 2 - 1, blocks)]  # the second is entered in the middle of its span
    with LocalSwarm(str(tmp_path)) as swarm:
        model = connect(tmp_path, join=swarm.start(spans=spans).token)
        for batch in (1, 3):
            ids = torch.randint(3, VOCABULARY, (batch, 14), generator=torch.Generator().manual_seed(batch))
            with torch.no_grad():
                remote, whole = (m.base_model(input_ids=ids, use_cache=False)[0] for m in (model, local))
                assert relative_error(remote, whole) < 1e-5
                assert relative_error(model(ids).logits, local(ids).logits) < 2e-5
            for way, options in WAYS.items():
                assert tokens(model, ids, options) == tokens(local, ids, options), f"{way}, batch of {batch}"
        model.close()
