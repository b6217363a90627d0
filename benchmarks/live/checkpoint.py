"""The tiny Llama of a scenario, which this stack and stock PETALS' (transformers 4.34) read alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from geopetals.bench.checkpoints import legacy_copy
from live.translation import HEADS, HIDDEN, KV_HEADS, TinyModel
from tests.models import VOCABULARY, save_model

_ROPE_THETA = 500_000.0
Answer = Callable[[tuple[int, ...], int], list[int]]


def save(tiny: TinyModel, folder: Path) -> Path:
    """Random weights, the same for the same shape."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=tiny.intermediate,
        num_hidden_layers=tiny.num_blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
    )
    return legacy_copy(save_model(folder / "whole", config, spread=1.0), folder / "tiny")


def local_answers(model: Path) -> Answer:
    """What the unmodified model answers in this process, greedily; each prompt is computed once."""
    local: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def answer(prompt: tuple[int, ...], tokens: int) -> list[int]:
        if (prompt, tokens) not in known:
            options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0, "do_sample": False}
            output = local.generate(torch.tensor([prompt]), **options)
            known[prompt, tokens] = [int(token) for token in output[0, len(prompt) :]]
        return known[prompt, tokens]

    return answer
