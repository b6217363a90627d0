from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geopetals.errors import GeoPetalsError
from geopetals.swarm import block_ops
from geopetals.swarm.block_ops import StepInput
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.stack import DUMMY, DUMMY_INT64, pack_args_kwargs
from geopetals.swarm.stage import Stage, load_stage
from geopetals.swarm.wire import WireError, serialize
from tests.models import save_llama

HIDDEN = 64
SPAN = range(1, 4)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    directory: Path = save_llama(tmp_path_factory.mktemp("ops"), layers=4)
    return load_stage(Checkpoint.open(str(directory)), 0, 4, dtype=torch.float32, device=torch.device("cpu"))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, reference: Tensor) -> bool:
    return ours.shape == reference.shape and float((ours - reference).abs().max()) <= 1e-5 * float(
        reference.abs().max()
    )


def block_by_block(stage: Stage, hidden: Tensor, prompts: Tensor | None) -> Tensor:
    for number, block in enumerate(SPAN):
        if prompts is not None:
            length = prompts.shape[2]
            hidden = torch.cat([hidden[:, :length] + prompts[number], hidden[:, length:]], dim=1)
        hidden = stage.run(hidden, block, block + 1)
    return hidden


def step(hidden: Tensor, *, prompts: Tensor | None = None, hypo_ids: Tensor | None = None) -> StepInput:
    return StepInput(hidden=hidden, prompts=prompts, hypo_ids=hypo_ids)


def read(stage: Stage, arguments: Sequence[Any], structure: Any = None, span: range = SPAN) -> StepInput:
    tensors, packed = pack_args_kwargs(*arguments)
    return block_ops.read_step(
        [serialize(tensor) for tensor in tensors], packed if structure is None else structure, stage, span
    )


PROMPTS = pytest.mark.parametrize("prompt_shape", [None, (3, 1, 2, HIDDEN), (3, 2, 5, HIDDEN), (3, 2, 0, HIDDEN)])


@PROMPTS
def test_forward_is_the_blocks_in_a_row(stage: Stage, prompt_shape: tuple[int, ...] | None) -> None:
    hidden = randn(2, 5, HIDDEN)
    prompts = None if prompt_shape is None else randn(*prompt_shape, seed=1)
    before = hidden.clone()
    with torch.inference_mode():
        assert close(block_ops.forward(stage, SPAN, hidden, prompts), block_by_block(stage, hidden, prompts))
    assert torch.equal(hidden, before)


@PROMPTS
def test_backward_is_autograd(stage: Stage, prompt_shape: tuple[int, ...] | None) -> None:
    hidden, gradient = randn(2, 5, HIDDEN), randn(2, 5, HIDDEN, seed=2)
    prompts = None if prompt_shape is None else randn(*prompt_shape, seed=1)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, prompts) if tensor is not None]
    block_by_block(stage, leaves[0], leaves[1] if len(leaves) > 1 else None).backward(gradient)
    found = block_ops.backward(stage, SPAN, hidden, gradient, prompts)
    assert len(found) == len(leaves)
    for ours, leaf in zip(found, leaves, strict=True):
        assert leaf.grad is not None
        assert ours.numel() == 0 or close(ours, leaf.grad)


def test_backward_leaves_no_gradients_behind(stage: Stage) -> None:
    hidden = randn(1, 3, HIDDEN)
    first, second = (block_ops.backward(stage, SPAN, hidden, hidden, None)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not hidden.requires_grad
    assert hidden.grad is None


@pytest.mark.parametrize("pieces", [(7,), (3, 4), (1, 1, 1, 1, 1, 1, 1), (3, 0, 4)])
def test_a_session_is_a_forward_in_pieces(stage: Stage, pieces: tuple[int, ...]) -> None:
    hidden = randn(2, 7, HIDDEN)
    kv = stage.allocate_kv(SPAN.start, SPAN.stop, batch=2, max_length=7)
    outputs = [block_ops.infer(stage, SPAN, kv, step(piece)) for piece in hidden.split(list(pieces), dim=1)]
    with torch.inference_mode():
        assert close(torch.cat(outputs, dim=1), block_by_block(stage, hidden, None))


@pytest.mark.parametrize("prompt_shape", [(3, 1, 2, HIDDEN), (3, 2, 5, HIDDEN)])
def test_a_session_takes_deep_prompts(stage: Stage, prompt_shape: tuple[int, ...]) -> None:
    hidden, prompts = randn(2, 7, HIDDEN), randn(*prompt_shape, seed=1)
    kv = stage.allocate_kv(SPAN.start, SPAN.stop, batch=2, max_length=7)
    first = block_ops.infer(stage, SPAN, kv, step(hidden[:, :5], prompts=prompts))
    rest = block_ops.infer(stage, SPAN, kv, step(hidden[:, 5:]))
    assert kv.length == 7
    with torch.inference_mode():
        assert close(torch.cat([first, rest], dim=1), block_by_block(stage, hidden, prompts))


def test_rows_go_on_where_hypo_ids_say(stage: Stage) -> None:
    past, new = randn(3, 4, HIDDEN), randn(3, 2, HIDDEN, seed=1)
    order = torch.tensor([2, 0, 0])
    kv = stage.allocate_kv(SPAN.start, SPAN.stop, batch=3, max_length=6)
    block_ops.infer(stage, SPAN, kv, step(past))
    found = block_ops.infer(stage, SPAN, kv, step(new, hypo_ids=order))
    with torch.inference_mode():
        expected = block_by_block(stage, torch.cat([past[order], new], dim=1), None)[:, 4:]
    assert close(found, expected)


@pytest.mark.parametrize("shape", [(2, 4, HIDDEN), (1, 7, HIDDEN), (3, 1, HIDDEN)])
def test_a_step_that_does_not_fit_changes_nothing(stage: Stage, shape: tuple[int, ...]) -> None:
    hidden = randn(2, 3, HIDDEN)
    kv = stage.allocate_kv(SPAN.start, SPAN.stop, batch=2, max_length=6)
    block_ops.infer(stage, SPAN, kv, step(hidden))
    with pytest.raises(WireError):
        block_ops.infer(stage, SPAN, kv, step(randn(*shape), hypo_ids=None))
    assert kv.length == 3
    again = block_ops.infer(stage, SPAN, kv, step(randn(2, 3, HIDDEN, seed=1)))
    with torch.inference_mode():
        whole = torch.cat([hidden, randn(2, 3, HIDDEN, seed=1)], dim=1)
        assert close(again, block_by_block(stage, whole, None)[:, 3:])


def test_petals_placeholders_are_nothing(stage: Stage) -> None:
    found = read(stage, (randn(2, 3, HIDDEN), DUMMY, DUMMY_INT64))
    assert (found.prompts, found.hypo_ids) == (None, None)
    assert torch.equal(found.hidden, randn(2, 3, HIDDEN))


def test_all_arguments_are_read(stage: Stage) -> None:
    prompts, order = randn(3, 1, 2, HIDDEN), torch.tensor([1, 0])
    found = read(stage, (randn(2, 3, HIDDEN).half(), prompts, order))
    assert found.hidden.dtype == torch.float32
    assert found.prompts is not None
    assert torch.equal(found.prompts, prompts)
    assert found.hypo_ids is not None
    assert torch.equal(found.hypo_ids, order)


def test_tensors_without_a_structure_are_the_arguments(stage: Stage) -> None:
    found = block_ops.read_step([serialize(randn(1, 2, HIDDEN))], None, stage, SPAN)
    assert torch.equal(found.hidden, randn(1, 2, HIDDEN))


HOSTILE: dict[str, tuple[Any, ...]] = {
    "nothing": (),
    "too few dimensions": (torch.zeros(2, HIDDEN),),
    "too many dimensions": (torch.zeros(1, 1, 2, HIDDEN),),
    "another hidden size": (torch.zeros(1, 2, HIDDEN + 1),),
    "integers": (torch.zeros(1, 2, HIDDEN, dtype=torch.int64),),
    "no sequences": (torch.zeros(0, 2, HIDDEN),),
    "too many sequences": (torch.zeros(1025, 0, HIDDEN),),
    "prompts of three dimensions": (torch.zeros(1, 2, HIDDEN), torch.zeros(3, 2, HIDDEN)),
    "prompts of too few blocks": (torch.zeros(1, 2, HIDDEN), torch.zeros(2, 1, 1, HIDDEN)),
    "prompts of another batch": (torch.zeros(3, 2, HIDDEN), torch.zeros(3, 2, 1, HIDDEN)),
    "prompts longer than the input": (torch.zeros(1, 2, HIDDEN), torch.zeros(3, 1, 3, HIDDEN)),
    "prompts of another hidden size": (torch.zeros(1, 2, HIDDEN), torch.zeros(3, 1, 1, 1)),
    "prompts of integers": (torch.zeros(1, 2, HIDDEN), torch.zeros(3, 1, 1, HIDDEN, dtype=torch.int64)),
    "too few hypo_ids": (torch.zeros(2, 2, HIDDEN), DUMMY, torch.tensor([0])),
    "hypo_ids of floats": (torch.zeros(2, 2, HIDDEN), DUMMY, torch.tensor([0.0, 1.0])),
    "hypo_ids below zero": (torch.zeros(2, 2, HIDDEN), DUMMY, torch.tensor([0, -1])),
    "hypo_ids above the batch": (torch.zeros(2, 2, HIDDEN), DUMMY, torch.tensor([0, 2])),
    "hypo_ids of two dimensions": (torch.zeros(2, 2, HIDDEN), DUMMY, torch.tensor([[0, 1]])),
    "a number": (7,),
    "text": ("hidden",),
    "a list of tensors": ([torch.zeros(1, 2, HIDDEN)],),
}


@pytest.mark.parametrize("arguments", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_arguments_are_refused(stage: Stage, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(WireError):
        read(stage, arguments)


@pytest.mark.parametrize(
    "structure",
    [
        0,
        True,
        "",
        [],
        {},
        b"__T0",
        b"__T1",
        [b"__T0"],
        [b"__T0", {}],
        [[b"__T9"], {}],
        [[b"__T-5"], {}],
        [[b"__Tx"], {}],
        [[b"__T"], {}],
        [[b"__T" + b"9" * 5000], {}],
        [[None], {}],
        [7, {}],
        [{"a": b"__T0"}, {}],
        [{"a": 1, 2: 3}, {}],
        [[b"__T0"], {}, 1],
    ],
    ids=lambda structure: repr(structure)[:40],
)
def test_hostile_structures_are_refused(stage: Stage, structure: Any) -> None:
    with pytest.raises(WireError):
        block_ops.read_step([serialize(torch.zeros(1, HIDDEN))], structure, stage, SPAN)


@pytest.mark.parametrize("depth", [100, 900, 5000])
def test_deep_structures_are_refused(stage: Stage, depth: int) -> None:
    structure: Any = b"__T0"
    for _ in range(depth):
        structure = [structure]
    with pytest.raises(WireError):
        block_ops.read_step([serialize(torch.zeros(1, 2, HIDDEN))], [structure, {}], stage, SPAN)


STRUCTURES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([b"__T0", b"__T1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(structure=STRUCTURES, shape=st.lists(st.sampled_from([0, 1, 2, HIDDEN]), max_size=4))
def test_whatever_is_sent_is_read_or_refused(stage: Stage, structure: Any, shape: list[int]) -> None:
    tensors = [serialize(torch.zeros(shape)), serialize(torch.zeros(2, dtype=torch.int64))]
    try:
        found = block_ops.read_step(tensors, structure, stage, SPAN)
        block_ops.forward(stage, SPAN, found.hidden, found.prompts)
    except (WireError, GeoPetalsError):
        return


def test_gradients_of_another_shape_are_refused(stage: Stage) -> None:
    with pytest.raises(WireError, match="gradients"):
        block_ops.backward(stage, SPAN, randn(1, 3, HIDDEN), randn(1, 2, HIDDEN), None)
