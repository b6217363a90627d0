"""Whether a model's layers form a chain that may be cut anywhere.

Every model is asked when it is loaded, so that nothing needs to be known of its family: layers that get more than
hidden states and positions, or leave something behind for each other, would give wrong tokens without any error.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import KVSharingDict

from geopetals.errors import CheckpointError
from geopetals.swarm.absent import Flow
from geopetals.swarm.architecture import MODEL_ERRORS

_HARMLESS = (bool, int, float, str, torch.dtype, torch.device, type(None))
_MOST_EXTRAS = 3

Leaves = dict[str, Any]


def find_convention(flow: Flow, name: str, run: Callable[[], Any], hands_through: Callable[[Tensor], bool]) -> None:
    """Set how the layers of `name` return their output: so that hidden states come through when no block runs.

    Raises CheckpointError if they come through in no way, because something else than the layers acts on them.
    """
    for flow.extras in (None, *range(_MOST_EXTRAS + 1)):
        try:
            out = run()
        except MODEL_ERRORS:
            continue
        if isinstance(out, Tensor) and hands_through(out):
            return
    raise CheckpointError(f"{name} does more than run its layers in a row: it cannot be split over servers.")


def require_chain(flow: Flow, name: str, layers: Sequence[nn.Module], run: Callable[[int], Any]) -> None:
    """`run(probe)` computes with tracked inputs, other ones for each `probe`, through layers that do nothing.

    Raises CheckpointError unless each layer is called once, in order, with arguments that depend on positions alone.
    """
    flow.tracing = True
    try:
        with torch.enable_grad():
            first, second = (_calls(layers, run, probe) for probe in (0, 1))
    finally:
        flow.tracing = False
    if [block for block, _ in first] != list(range(len(layers))):
        raise CheckpointError(f"{name} does not run each layer once and in order: it cannot be split over servers.")
    for (_, arguments), (_, others) in zip(first, second, strict=True):
        for key, value in arguments.items():
            if not _depends_on_positions_alone(value, others.get(key)):
                raise CheckpointError(
                    f"the layers of {name} get more than hidden states and positions ({key}): "
                    "it cannot be split over servers."
                )


def _calls(layers: Sequence[nn.Module], run: Callable[[int], Any], probe: int) -> list[tuple[int, Leaves]]:
    calls: list[tuple[int, Leaves]] = []

    def record(block: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            beside = dict(enumerate(args[1:], start=1)) if args else {}
            named = {str(key): value for key, value in (beside | kwargs).items() if key != "hidden_states"}
            calls.append((block, dict(_leaves(named, ""))))

        return hook

    handles = [layer.register_forward_pre_hook(record(block), with_kwargs=True) for block, layer in enumerate(layers)]
    try:
        run(probe)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What a nested argument consists of. Empty containers are leaves: layers may be meant to fill them."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and len(value):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}[{number}]")
    else:
        yield path, value


def _depends_on_positions_alone(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.requires_grad and isinstance(other, Tensor) and torch.equal(value, other)
    # Layers that share keys and values through it are known by their caches, and have been refused.
    if isinstance(value, DynamicCache | KVSharingDict) or value == ():
        return True
    return isinstance(value, _HARMLESS) and bool(value == other)
