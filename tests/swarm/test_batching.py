"""A decode step gives the same in a batch of sessions as alone, for every family, whatever the sessions are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from geopetals.errors import UnsupportedInput
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.stage import Stage, load_stage
from tests.batches import Twins, decode, decode_error
from tests.families import save_tiny, tiny_config
from tests.in_process import CPU
from tests.swarm.test_families import FAMILIES

EXACT = 1e-5
SPAN = range(1, 5)
PADDED = {"bloom", "falcon", "falcon-alibi", "falcon-grouped"}
ALONE = {"llama4-chunks"}
LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 16,
    },
    "original_max_position_embeddings": 16,
    "sliding_window": None,
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Stage]:
    stages: dict[str, Stage] = {}

    def get(name: str, **more: Any) -> Stage:
        key = f"{name} {more}"
        if key not in stages:
            family, options = FAMILIES.get(name, (name, {}))
            directory: Path = tmp_path_factory.mktemp("family")
            save_tiny(directory, tiny_config(family, **options, **more))
            checkpoint = Checkpoint.open(str(directory))
            stages[key] = load_stage(checkpoint, SPAN.start, SPAN.stop, dtype=torch.float32, device=CPU)
        return stages[key]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_exact_and_nearly_every_one_batches(load: Callable[..., Stage], name: str) -> None:
    stage = load(name)
    layout = None if name in ALONE else "padded" if name in PADDED else "rows"
    assert (stage.batching.layout, stage.batches) == (layout, name not in ALONE)
    assert ("one by one: " in stage.batching.describe()) == (name in ALONE)
    assert decode_error(stage) < EXACT


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
def test_both_layouts_are_exact(load: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stage = load(name)
    monkeypatch.setattr(stage.batching, "layout", "padded")
    assert decode_error(stage) < EXACT


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-alibi"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sessions=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=5),
    turns=st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=6),
)
def test_any_sessions_in_any_turns(
    load: Callable[..., Stage], name: str, sessions: list[tuple[int, int]], turns: list[set[int]]
) -> None:
    """Sessions of several sequences and lengths, beyond the sliding window too; each turn is a batch of some."""
    stage = load(name)
    span = range(2, 4)
    twins = [
        Twins(stage, span, batch=batch, max_length=length + len(turns), seed=seed)
        for seed, (batch, length) in enumerate(sessions)
    ]
    for twin, (_, length) in zip(twins, sessions, strict=True):
        twin.prefill(length)
    for turn in turns:
        chosen = [twin for number, twin in enumerate(twins) if number in turn]
        if chosen:
            assert decode(stage, span, chosen) < EXACT


def test_caches_of_other_spans_may_share_a_batch(load: Callable[..., Stage]) -> None:
    """What counts is which blocks are computed, not which the cache is for."""
    stage = load("gemma3")
    wide, narrow = stage.allocate_kv(1, 5, batch=1, max_length=9), stage.allocate_kv(2, 4, batch=1, max_length=9)
    hidden = torch.randn(2, 1, stage.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = torch.cat(
        [stage.run(row[None], 2, 4, kv=stage.allocate_kv(2, 4, batch=1, max_length=1)) for row in hidden]
    )
    assert torch.allclose(stage.decode(hidden, 2, 4, [wide, narrow]), expected, atol=1e-5)


def test_what_a_batch_refuses_leaves_every_cache_as_it_was(load: Callable[..., Stage]) -> None:
    stage = load("llama")
    full, other = (stage.allocate_kv(1, 5, batch=1, max_length=length) for length in (2, 9))
    for kv in (full, other):
        stage.run(torch.zeros(1, 2, stage.hidden_size), 1, 5, kv=kv)
    with pytest.raises(UnsupportedInput, match="exceed the session's limit"):
        stage.decode(torch.zeros(2, 1, stage.hidden_size), 1, 5, [full, other])
    assert (full.length, other.length) == (2, 2)


def test_a_session_that_is_not_a_number_harms_no_other(load: Callable[..., Stage]) -> None:
    for name in ("llama", "bloom", "mixtral"):
        stage = load(name)
        twins = [Twins(stage, SPAN, batch=1, max_length=20, seed=seed) for seed in range(3)]
        for length, twin in enumerate(twins, start=3):
            twin.prefill(length)
        bad = torch.full((1, 1, stage.hidden_size), float("nan"))
        stage.run(bad, SPAN.start, SPAN.stop, kv=twins[1].together)
        inputs = torch.cat([twins[0].hidden(1), bad, twins[2].hidden(1)])
        out = stage.decode(inputs, SPAN.start, SPAN.stop, [twin.together for twin in twins])
        for number in (0, 2):
            alone = stage.run(inputs[number][None], SPAN.start, SPAN.stop, kv=twins[number].alone)
            assert torch.allclose(out[number], alone[0], atol=1e-4)


def test_longrope_sessions_on_both_sides_of_the_limit_are_told_apart(load: Callable[..., Stage]) -> None:
    stage = load("phi3", **LONGROPE)
    short, long = (stage.allocate_kv(1, 5, batch=1, max_length=30) for _ in range(2))
    stage.run(torch.zeros(1, 15, stage.hidden_size), 1, 5, kv=short)
    stage.run(torch.zeros(1, 20, stage.hidden_size), 1, 5, kv=long)
    assert (stage.past_rope_limit(short), stage.past_rope_limit(long)) == (False, True)
    assert stage.piece_tokens(stage.allocate_kv(1, 5, batch=1, max_length=30), 20, 8) == 20
    assert stage.piece_tokens(long, 9, 8) == 8


def test_a_window_that_only_the_attention_knows_of_is_found(load: Callable[..., Stage]) -> None:
    """It is counted from the last key, which side by side is another session's; the probe is shorter than it."""
    stage = load("gpt_neo", attention_types=[[["global", "local"], 3]], window_size=256)
    assert not stage.batches
    assert "a batch differs" in stage.batching.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama4_text", "gpt_neo"])
def test_no_format_hides_what_depends_on_other_sessions(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """In half precision rounding is as large as some of these mistakes."""
    save_tiny(tmp_path, tiny_config(family))
    checkpoint = Checkpoint.open(str(tmp_path))
    assert not load_stage(checkpoint, SPAN.start, SPAN.stop, dtype=dtype, device=CPU).batches


def test_outside_of_a_batch_the_model_runs_as_transformers_has_it(load: Callable[..., Stage]) -> None:
    stage = load("llama")
    decode_error(stage)
    assert stage.config._attn_implementation == "sdpa"


class Stubborn:
    """Attention that keeps something of its own between steps, by how many rows came."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._forward(*args, **kwargs)
        rows: Tensor = out[0]
        return (rows * (1 + 0.1 * (len(rows) > 2)), *out[1:])


def test_a_family_that_is_not_exact_in_a_batch_is_computed_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    save_tiny(tmp_path, tiny_config("llama"))
    forward = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda *args, **kwargs: Stubborn(forward)(*args, **kwargs))
    stage = load_stage(Checkpoint.open(str(tmp_path)), 1, 5, dtype=torch.float32, device=CPU)
    assert not stage.batches
    assert "differs" in stage.batching.reason
    assert decode_error(stage) == 0.0
