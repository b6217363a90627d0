"""What a block server computes: one decode or prefill step, a forward pass, a backward pass; in the compute thread,
but for reading what a peer sent.

Arguments come from peers in PETALS' packing: hidden states [batch, tokens, hidden], then optional deep prompts
[blocks, batch or 1, prefix, hidden] that are added to the first positions of each block's input, then beam indices
[batch].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.proto import runtime_pb2

from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.stack import is_dummy, unpack_args_kwargs
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import MAX_BATCH, WireError, deserialize, is_finite

_MAX_TENSORS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """Checked input of one step: `prompts` and `hypo_ids` are None where the peer sent nothing."""

    hidden: torch.Tensor
    prompts: torch.Tensor | None
    hypo_ids: torch.Tensor | None


def unpack(tensors: Sequence[runtime_pb2.Tensor], structure: Any) -> list[torch.Tensor]:
    """The tensors of a request in the order of PETALS' arguments."""
    if len(tensors) > _MAX_TENSORS:
        raise WireError(f"a request has at most {_MAX_TENSORS} tensors, got {len(tensors)}")
    flat = tuple(deserialize(tensor) for tensor in tensors)
    if structure is None:
        return list(flat)
    try:
        arguments = list(unpack_args_kwargs(flat, structure)[0])
    except Exception as error:  # a stranger's nested structure may raise anything on its way
        raise WireError("the request's args_structure does not fit its tensors") from error
    if not all(isinstance(argument, torch.Tensor) for argument in arguments):
        raise WireError("the request's arguments are not all tensors")
    return arguments


def read_step(tensors: Sequence[runtime_pb2.Tensor], structure: Any, stage: Stage, span: range) -> StepInput:
    arguments = unpack(tensors, structure)
    hidden = check_hidden(arguments[0] if arguments else None, stage)
    prompts = check_prompts(arguments[1] if len(arguments) > 1 else None, hidden, span, stage)
    hypo_ids = arguments[2] if len(arguments) > 2 and not is_dummy(arguments[2]) else None
    if hypo_ids is not None:
        if hypo_ids.dtype != torch.int64 or hypo_ids.shape != hidden.shape[:1]:
            raise WireError(f"hypo_ids must be {hidden.shape[0]} int64 indices, got {tuple(hypo_ids.shape)}")
        if bool((hypo_ids < 0).any()) or bool((hypo_ids >= hidden.shape[0]).any()):
            raise WireError("hypo_ids point outside the batch")
    return StepInput(hidden=hidden, prompts=prompts, hypo_ids=hypo_ids)


def check_hidden(hidden: torch.Tensor | None, stage: Stage) -> torch.Tensor:
    """Hidden states in the stage's dtype, or WireError. Nothing is put on its device here: that waits for its work."""
    if hidden is None or hidden.ndim != 3 or hidden.shape[2] != stage.hidden_size or not hidden.is_floating_point():
        shape = None if hidden is None else tuple(hidden.shape)
        raise WireError(f"hidden states must be floats of shape [batch, tokens, {stage.hidden_size}], got {shape}")
    if not 1 <= hidden.shape[0] <= MAX_BATCH:
        raise WireError(f"a batch has 1 to {MAX_BATCH} sequences, got {hidden.shape[0]}")
    return _finite(hidden.to(stage.dtype), "hidden states")


def check_prompts(prompts: torch.Tensor | None, hidden: torch.Tensor, span: range, stage: Stage) -> torch.Tensor | None:
    if prompts is None or is_dummy(prompts):
        return None
    if prompts.ndim != 4 or prompts.shape[0] != len(span) or not prompts.is_floating_point():
        raise WireError(f"deep prompts must be floats of shape [{len(span)}, batch, prefix, hidden]")
    if prompts.shape[1] not in (1, hidden.shape[0]) or prompts.shape[2] > hidden.shape[1]:
        raise WireError("deep prompts do not fit the batch or the length of the hidden states")
    if prompts.shape[3] != stage.hidden_size:
        raise WireError(f"deep prompts must be of hidden size {stage.hidden_size}, got {prompts.shape[3]}")
    return _finite(prompts.to(stage.dtype), "deep prompts")


def _finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Refused rather than computed on: what is not finite here is somebody's mistake, and no client could use it."""
    if not is_finite(tensor):
        raise WireError(f"the {what} are not finite in this server's {str(tensor.dtype).removeprefix('torch.')}")
    return tensor


def infer(stage: Stage, span: range, kv: SessionKV, step: StepInput) -> torch.Tensor:
    """One step of a session; its keys and values are appended to `kv`."""
    check_room(kv, step)
    with torch.inference_mode():
        if step.hypo_ids is not None:
            kv.reorder(step.hypo_ids)
        if step.hidden.shape[1] == 0:
            return step.hidden
        if step.prompts is None:
            return stage.run(step.hidden, span.start, span.stop, kv=kv)
        return _infer_with_prompts(stage, span, kv, step.hidden, step.prompts)


def infer_together(stage: Stage, span: range, steps: Sequence[tuple[SessionKV, StepInput]]) -> tuple[torch.Tensor, ...]:
    """Steps of one token, without prompts and hypo_ids, of several sessions: what each would give alone.

    If it raises, the caches hold what they held.
    """
    for kv, step in steps:
        check_room(kv, step)
    hidden = torch.cat([step.hidden for _, step in steps])
    with torch.inference_mode():
        out = stage.decode(hidden, span.start, span.stop, [kv for kv, _ in steps])
    return tuple(out.split([kv.batch for kv, _ in steps]))


def check_room(kv: SessionKV, step: StepInput) -> None:
    if kv.length + step.hidden.shape[1] > kv.max_length:
        raise WireError(
            f"the session holds {kv.length} tokens of at most {kv.max_length}: {step.hidden.shape[1]} more do not fit"
        )
    if step.hidden.shape[0] != kv.batch:
        raise WireError(f"the session was opened for a batch of {kv.batch}, got {step.hidden.shape[0]}")


def _infer_with_prompts(
    stage: Stage, span: range, kv: SessionKV, hidden: torch.Tensor, prompts: torch.Tensor
) -> torch.Tensor:
    before, home = kv.length, hidden.device
    hidden, prompts = hidden.to(stage.device), prompts.to(stage.device)
    for block, prompt in zip(span, prompts, strict=True):
        kv.length = before
        hidden = stage.run(_add_prompt(hidden, prompt), block, block + 1, kv=kv)
    return hidden.to(home)


def forward(stage: Stage, span: range, hidden: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
    """Hidden states after the span, without a cache."""
    if prompts is None:
        return stage.run(hidden, span.start, span.stop)
    home = hidden.device
    hidden, prompts = hidden.to(stage.device), prompts.to(stage.device)
    for block, prompt in zip(span, prompts, strict=True):
        hidden = stage.run(_add_prompt(hidden, prompt), block, block + 1)
    return hidden.to(home)


def backward(
    stage: Stage, span: range, hidden: torch.Tensor, grad_output: torch.Tensor, prompts: torch.Tensor | None
) -> list[torch.Tensor]:
    """Gradients with respect to the hidden states and, if there are any, to the prompts."""
    if grad_output.shape != hidden.shape:
        raise WireError(f"gradients must have the shape {tuple(hidden.shape)}, got {tuple(grad_output.shape)}")
    with torch.enable_grad():
        inputs = [hidden.detach().requires_grad_()]
        if prompts is not None:
            inputs.append(prompts.detach().requires_grad_())
        output = forward(stage, span, inputs[0], inputs[1] if prompts is not None else None)
        return list(torch.autograd.grad(output, inputs, grad_output))


def _add_prompt(hidden: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    length = prompt.shape[1]
    return torch.cat([hidden[:, :length] + prompt, hidden[:, length:]], dim=1)
