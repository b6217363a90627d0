"""The modules of a hollow model that stand for what a process does not hold, or does not run now."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geopetals.swarm.architecture import INPUT_FACTORS, find_decoder, find_layers


class Flow:
    """What the modules of one hollow model share: the blocks that run now, and how layers return their output.

    `extras` is None where layers return hidden states, else how many values follow them in a tuple. Nobody may use
    these: while `tracing`, they depend on the hidden states, so that a model that passes them on gives itself away.
    """

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.extras: int | None = None
        self.tracing = False

    def pack(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        if self.extras is None:
            return hidden
        return (hidden, *[hidden if self.tracing else None] * self.extras)


class AbsentBlock(nn.Module):
    """A decoder layer that this process does not hold."""

    def __init__(self, flow: Flow, layer: nn.Module) -> None:
        super().__init__()
        self._flow = flow
        copy_settings(layer, self)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor | None, ...]:
        return self._flow.pack(hidden_states)


def copy_settings(layer: nn.Module, substitute: nn.Module) -> None:
    """Give `substitute` what the loops of some base models read of a layer: its kind of attention, its index, ..."""
    for name, value in vars(layer).items():
        if isinstance(value, str | int | None) and not name.startswith("_") and name not in vars(substitute):
            setattr(substitute, name, value)


class AbsentPositions(nn.Module):
    """Absolute positions on a server: the client has added them already."""

    def forward(self, positions: Tensor, *args: object, **kwargs: object) -> Tensor:
        return torch.zeros((1, 1, 1), dtype=torch.int64, device=positions.device)  # integers leave dtypes as they are


class AbsentStep(nn.Module):
    """An embedding, a norm or a head that this process does not hold."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        candidates = (kwargs.get("inputs_embeds"), *args, *kwargs.values())
        for value in candidates:
            if isinstance(value, Tensor):
                return value
        raise TypeError("a part that is not held here was called without hidden states")


class Gate(nn.Module):
    """A decoder layer that is held, and runs when it is among the blocks asked for."""

    def __init__(self, layer: nn.Module, block: int, flow: Flow) -> None:
        super().__init__()
        self.layer = layer
        self._block = block
        self._flow = flow

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        if self._flow.start <= self._block < self._flow.end:
            return self.layer(hidden_states, *args, **kwargs)
        return self._flow.pack(hidden_states)


def hollow_for_server(model: PreTrainedModel, flow: Flow, num_blocks: int) -> None:
    """Keep the served layers, and what has no weights, as rotary embeddings; the rest hands hidden states through."""
    decoder, _, layers = find_decoder(model, num_blocks)
    for block, layer in enumerate(layers):
        if not flow.start <= block < flow.end:
            layers[block] = AbsentBlock(flow, layer)
    embedding = decoder.get_input_embeddings()
    node, inside = cast(nn.Module, model), False
    for part in find_layers(model, num_blocks)[0].split("."):
        inside = inside or node is decoder
        for child_name, child in list(node.named_children()):
            if child_name != part and (not inside or _acts_on_hidden_states(child_name, child)):
                is_position = child_name == "embed_positions" or isinstance(child, nn.Embedding)
                absent = AbsentPositions() if is_position and child is not embedding else AbsentStep()
                setattr(node, child_name, absent)
        node = node.get_submodule(part)
    for factor in INPUT_FACTORS:
        if hasattr(decoder, factor):
            setattr(decoder, factor, 1.0)
    model.all_tied_weights_keys = {}


def _acts_on_hidden_states(name: str, module: nn.Module) -> bool:
    return name == "embed_positions" or "norm" in name or next(module.parameters(), None) is not None
