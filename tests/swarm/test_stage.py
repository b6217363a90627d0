from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from geopetals.errors import BlocksError, MemoryShortage, UnsupportedInput
from geopetals.progress import Silent
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.stage import Stage, load_stage
from tests.models import save_llama

CPU = torch.device("cpu")
HIDDEN = 64
# (blocks a server holds, blocks a session uses of them)
TWO = (((0, 3), (0, 3)), ((3, 6), (3, 6)))
OVERLAPPING = (((0, 4), (0, 3)), ((1, 6), (3, 6)))
THREE = (((0, 2), (0, 2)), ((1, 5), (2, 4)), ((4, 6), (4, 6)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("stage"), sharded=True)


@pytest.fixture(scope="module")
def local(directory: Path) -> PreTrainedModel:
    """The unmodified model without its final norm: its hidden states are those after the last block."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.model.norm = torch.nn.Identity()
    return model


def load(directory: Path, start: int, end: int, dtype: torch.dtype = torch.float32) -> Stage:
    return load_stage(Checkpoint.open(str(directory)), start, end, dtype=dtype, device=CPU)


@pytest.fixture(scope="module")
def middle(directory: Path) -> Stage:
    return load(directory, 2, 5)


def hidden_states(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


class Chain:
    """Stages in a row, each with the session's cache."""

    def __init__(self, directory: Path, plan: Sequence[tuple[tuple[int, int], tuple[int, int]]], batch: int) -> None:
        self.hops: list[tuple[Stage, int, int, SessionKV]] = []
        for held, used in plan:
            stage = load(directory, *held)
            self.hops.append((stage, *used, stage.allocate_kv(*used, batch=batch, max_length=64)))

    def __call__(self, hidden: Tensor) -> Tensor:
        for stage, start, end, kv in self.hops:
            hidden = stage.run(hidden, start, end, kv=kv)
        return hidden


@pytest.mark.parametrize("plan", [TWO, OVERLAPPING, THREE])
@pytest.mark.parametrize("batch", [1, 3])
def test_hidden_states_equal_the_local_model(
    directory: Path, local: PreTrainedModel, plan: tuple[tuple[tuple[int, int], tuple[int, int]], ...], batch: int
) -> None:
    chain, cache = Chain(directory, plan, batch), DynamicCache(config=local.config)
    for step, tokens in enumerate((5, 7, 1, 1, 4, 1)):
        hidden = hidden_states(batch, tokens, seed=step)
        with torch.no_grad():
            expected = local.model(inputs_embeds=hidden, past_key_values=cache, use_cache=True)[0]
        assert relative_error(chain(hidden), expected) < 1e-5
    assert [kv.length for *_, kv in chain.hops] == [19] * len(plan)


@pytest.mark.parametrize("options", [{"tied": True}, {"kv_heads": 4}, {"kv_heads": 1}, {"attention_bias": True}])
def test_single_file_variants(tmp_path: Path, options: dict[str, object]) -> None:
    directory = save_llama(tmp_path, **options)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.model.norm = torch.nn.Identity()
    hidden = hidden_states(2, 9)
    with torch.no_grad():
        expected = model.model(inputs_embeds=hidden, use_cache=False)[0]
    assert relative_error(Chain(directory, OVERLAPPING, 2)(hidden), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_the_local_model(directory: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    model.model.norm = torch.nn.Identity()
    stage = load(directory, 0, 6, dtype)
    hidden = hidden_states(2, 6)
    with torch.no_grad():
        expected = model.model(inputs_embeds=hidden.to(dtype), use_cache=False)[0]
    kv = stage.allocate_kv(0, 6, batch=2, max_length=6)
    out = stage.run(hidden, 0, 6, kv=kv)
    assert out.dtype == dtype
    assert relative_error(out.float(), expected.float()) < 1e-2
    assert stage.kv_bytes_per_token() == 2 * 2 * 16 * dtype.itemsize


def test_weights_take_the_memory_announced(directory: Path) -> None:
    checkpoint = Checkpoint.open(str(directory))
    stage = load(directory, 1, 3)
    assert (
        2 * checkpoint.block_bytes(torch.float32) <= stage.memory_bytes < 2.01 * checkpoint.block_bytes(torch.float32)
    )
    assert load(directory, 1, 3, torch.bfloat16).memory_bytes < 0.51 * stage.memory_bytes


def test_cache_takes_the_memory_announced(middle: Stage) -> None:
    kv = middle.allocate_kv(2, 4, batch=3, max_length=10)
    assert kv.memory_bytes == 2 * 3 * 10 * middle.kv_bytes_per_token()
    assert middle.kv_bytes_per_token() == 2 * 2 * 16 * 4  # keys and values, 2 heads of 16: grouped queries


def test_gradients_equal_the_local_model(directory: Path, local: PreTrainedModel) -> None:
    hidden, upstream = hidden_states(2, 5), hidden_states(2, 5, seed=1)
    reference = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(local.model(inputs_embeds=reference, use_cache=False)[0], reference, upstream)
    for stage, start, end in ((load(directory, 0, 6), 0, 6),):
        ours = hidden.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(stage.run(ours, start, end), ours, upstream)
        assert relative_error(gradient, expected) < 1e-5


def test_gradient_through_part_of_a_span(middle: Stage) -> None:
    hidden = hidden_states(1, 4).requires_grad_()
    whole = torch.autograd.grad(middle.run(hidden, 2, 5).sum(), hidden)[0]
    parts = torch.autograd.grad(middle.run(middle.run(hidden, 2, 3), 3, 5).sum(), hidden)[0]
    assert relative_error(parts, whole) < 1e-5


def test_sessions_do_not_disturb_each_other(middle: Stage) -> None:
    inputs = [hidden_states(1, 3, seed=seed) for seed in range(3)]
    alone = [middle.run(hidden, 2, 5, kv=middle.allocate_kv(2, 5, batch=1, max_length=3)) for hidden in inputs]
    caches = [middle.allocate_kv(2, 5, batch=1, max_length=3) for _ in inputs]
    for position in range(3):
        for hidden, kv, expected in zip(inputs, caches, alone, strict=True):
            out = middle.run(hidden[:, position : position + 1], 2, 5, kv=kv)
            assert relative_error(out, expected[:, position : position + 1]) < 1e-5


def test_truncated_cache_continues_as_if_nothing_had_been(middle: Stage) -> None:
    kv = middle.allocate_kv(2, 5, batch=1, max_length=8)
    first, second = hidden_states(1, 4, seed=1), hidden_states(1, 4, seed=2)
    middle.run(first, 2, 5, kv=kv)
    expected = middle.run(second, 2, 5, kv=kv)
    kv.truncate(4)
    assert torch.equal(middle.run(second, 2, 5, kv=kv), expected)
    with pytest.raises(UnsupportedInput):
        kv.truncate(9)


def test_reordered_rows_continue_the_right_past(middle: Stage) -> None:
    past, step = hidden_states(3, 4), hidden_states(3, 1, seed=1)
    order = torch.tensor([2, 0, 2])
    kv = middle.allocate_kv(2, 5, batch=3, max_length=8)
    middle.run(past, 2, 5, kv=kv)
    kv.reorder(order)
    reference = middle.allocate_kv(2, 5, batch=3, max_length=8)
    middle.run(past[order], 2, 5, kv=reference)
    assert relative_error(middle.run(step, 2, 5, kv=kv), middle.run(step, 2, 5, kv=reference)) < 1e-5


def cache_tensors(kv: SessionKV) -> Iterator[Tensor]:
    for layer in kv.cache.layers:
        if hasattr(layer, "k"):
            yield from (layer.k, layer.v)


def test_reordering_touches_only_the_past(middle: Stage) -> None:
    kv = middle.allocate_kv(2, 5, batch=2, max_length=8)
    for tensor in cache_tensors(kv):
        tensor.fill_(7.0)
    middle.run(hidden_states(2, 3), 2, 5, kv=kv)
    versions = [tensor.clone() for tensor in cache_tensors(kv)]
    kv.reorder(torch.tensor([0, 1]))
    assert all(torch.equal(*pair) for pair in zip(versions, cache_tensors(kv), strict=True))
    kv.reorder(torch.tensor([1, 0]))
    for before, after in zip(versions, cache_tensors(kv), strict=True):
        assert torch.equal(after[:, :, :3], before[[1, 0], :, :3])
        assert torch.equal(after[:, :, 3:], before[:, :, 3:])


def allocated_bytes(stage: Stage, *, past: int) -> int:
    """What the operators of one decode step allocate, the inside of fused ones included."""
    kv = stage.allocate_kv(2, 5, batch=2, max_length=1024)
    stage.run(hidden_states(2, past), 2, 5, kv=kv)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        stage.run(hidden_states(2, 1), 2, 5, kv=kv)
    return sum(max(event.self_cpu_memory_usage, 0) for event in trace.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_step_copies_nothing_of_the_past(directory: Path, dtype: torch.dtype) -> None:
    stage = load(directory, 2, 5, dtype)
    addresses: list[list[int]] = []
    kv = stage.allocate_kv(2, 5, batch=2, max_length=16)
    for tokens in (4, 1, 1):
        stage.run(hidden_states(2, tokens), 2, 5, kv=kv)
        addresses.append([tensor.data_ptr() for tensor in cache_tensors(kv)])
    assert addresses[0] == addresses[1] == addresses[2]
    growth = allocated_bytes(stage, past=900) - allocated_bytes(stage, past=100)
    one_layer_keys = 800 * 2 * stage.kv_bytes_per_token() // 2
    assert growth < 3 * 0.1 * one_layer_keys


def test_empty_input_opens_a_session_without_computing(middle: Stage) -> None:
    kv = middle.allocate_kv(2, 5, batch=1, max_length=4)
    assert middle.run(hidden_states(1, 0), 2, 5, kv=kv).shape == (1, 0, HIDDEN)
    assert kv.length == 0


@pytest.mark.parametrize(("start", "end"), [(0, 3), (2, 6), (3, 3), (4, 3), (-1, 3)])
def test_blocks_that_are_not_held(middle: Stage, start: int, end: int) -> None:
    with pytest.raises(BlocksError, match=r"2:5"):
        middle.run(hidden_states(1, 1), start, end)
    with pytest.raises(BlocksError, match=r"2:5"):
        middle.allocate_kv(start, end, batch=1, max_length=1)


@pytest.mark.parametrize(
    "hidden",
    [
        torch.zeros(1, 2, HIDDEN + 1),
        torch.zeros(2, HIDDEN),
        torch.zeros(0, 1, HIDDEN),
        torch.zeros(1, 1, HIDDEN, dtype=torch.int64),
        torch.zeros(2, 1, HIDDEN),
        torch.zeros(1, 6, HIDDEN),
    ],
)
def test_bad_input_is_refused_and_the_session_lives_on(middle: Stage, hidden: Tensor) -> None:
    kv = middle.allocate_kv(2, 5, batch=1, max_length=6)
    good = hidden_states(1, 1)
    expected = middle.run(good, 2, 5, kv=middle.allocate_kv(2, 5, batch=1, max_length=6))
    assert torch.equal(middle.run(good, 2, 5, kv=kv), expected)
    with pytest.raises(UnsupportedInput):
        middle.run(hidden, 2, 5, kv=kv)
    assert kv.length == 1
    kv.truncate(0)
    assert torch.equal(middle.run(good, 2, 5, kv=kv), expected)


@pytest.mark.parametrize("ids", [[0], [0, 1, 2], [0, 2], [-1, 0]])
def test_bad_hypotheses_are_refused(middle: Stage, ids: list[int]) -> None:
    kv = middle.allocate_kv(2, 5, batch=2, max_length=4)
    with pytest.raises(UnsupportedInput):
        kv.reorder(torch.tensor(ids))


def test_cache_of_another_span_is_refused(middle: Stage) -> None:
    with pytest.raises(UnsupportedInput, match=r"2:4"):
        middle.run(hidden_states(1, 1), 2, 5, kv=middle.allocate_kv(2, 4, batch=1, max_length=4))


def test_impossible_caches_are_refused(middle: Stage) -> None:
    with pytest.raises(MemoryShortage, match=r"MB"):
        middle.allocate_kv(2, 5, batch=1, max_length=10**13)
    with pytest.raises(UnsupportedInput):
        middle.allocate_kv(2, 5, batch=0, max_length=4)


def test_damage_in_other_blocks_does_not_matter_in_one_file(tmp_path: Path) -> None:
    directory = save_llama(tmp_path)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file({key: torch.nan * tensor if ".layers.0." in key else tensor for key, tensor in tensors.items()}, path)
    stage = load(directory, 1, 6)
    assert torch.isfinite(stage.run(hidden_states(1, 3), 1, 6)).all()


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_loading_is_reported_and_nothing_else_is_printed(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reporter = Lines()
    load_stage(Checkpoint.open(str(directory)), 0, 2, dtype=torch.float32, device=CPU, reporter=reporter)
    assert "6 blocks of 0.1 MB" in reporter.lines[0]
    assert reporter.lines[-2].startswith("blocks 0:2 loaded: 0.3 MB in ")
    assert reporter.lines[-1] == "decode steps of several sessions are computed together"
    assert capfd.readouterr() == ("", "")
