"""Remote blocks as one differentiable operation: rpc_forward on the way there, rpc_backward on the way back.

Servers keep nothing in between: what each of them was given is kept here, and sent again with the gradients.
"""

from typing import Any

import torch
from torch import Tensor

from geopetals.client.chain_pass import Visit, backward_batches, forward_batches
from geopetals.client.swarm import SwarmClient


def through_swarm(swarm: SwarmClient, hidden: Tensor, prompts: Tensor | None = None) -> Tensor:
    """Hidden states [batch, tokens, hidden] after all blocks, without a cache, on the device and in the format given.

    `prompts` [blocks, batch or 1, prefix, hidden] are added to the first positions of each block's input. The result
    can be differentiated once with respect to both; where no gradient is needed, nothing is kept. Raises SwarmFailure,
    in the backward pass too, when no chain is left to try.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or (prompts is not None and prompts.requires_grad)):
        apply: Any = _ThroughSwarm.apply
        output: Tensor = apply(hidden, prompts, swarm)
        return output
    local = swarm.run(swarm.forward_async(hidden.detach().cpu(), None if prompts is None else prompts.detach().cpu()))
    return local.to(device=hidden.device, dtype=hidden.dtype)


class _ThroughSwarm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, prompts: Tensor | None, swarm: SwarmClient) -> Tensor:
        local_prompts = None if prompts is None else prompts.detach().cpu()
        output, visits = swarm.run(forward_batches(swarm, hidden.detach().cpu(), local_prompts, keep_inputs=True))
        ctx.swarm = swarm
        ctx.hops = [[visit.hop for visit in piece] for piece in visits]
        ctx.save_for_backward(prompts, *(visit.inputs for piece in visits for visit in piece))
        return output.to(device=hidden.device, dtype=hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        prompts, *inputs = ctx.saved_tensors
        kept = iter(inputs)
        visits = [[Visit(hop=hop, inputs=next(kept)) for hop in hops] for hops in ctx.hops]
        grad_hidden, grad_prompts = ctx.swarm.run(
            backward_batches(ctx.swarm, visits, grad_output.cpu(), None if prompts is None else prompts.cpu())
        )
        if grad_prompts is not None:
            grad_prompts = grad_prompts.to(device=prompts.device, dtype=prompts.dtype)
        wants_hidden, wants_prompts, _ = ctx.needs_input_grad
        return (
            grad_hidden.to(device=grad_output.device, dtype=grad_output.dtype) if wants_hidden else None,
            grad_prompts if wants_prompts else None,
            None,
        )
