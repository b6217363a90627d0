"""Hollow models: the model's own Hugging Face class, with everything that this process does not hold taken out.

Transformers' forward() then computes positions, rotary embeddings and masks by itself, for every family.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from geopetals.errors import CheckpointError, MemoryShortage
from geopetals.progress import Reporter
from geopetals.swarm.architecture import MODEL_ERRORS, native_class
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.device_memory import is_out_of_memory
from geopetals.swarm.quantization import check_stored, quantization_config

_LOAD_ERRORS: tuple[type[Exception], ...] = (SafetensorError, MemoryError, *MODEL_ERRORS)


def load_hollow(
    checkpoint: Checkpoint,
    *,
    hollow: Callable[[PreTrainedModel], None],
    wanted: Callable[[str], bool],
    dtype: torch.dtype,
    device: torch.device,
    reporter: Reporter,
    task: str,
    holds_blocks: bool = True,
    quantization: str | None = None,
) -> PreTrainedModel:
    """Build the model without weights, take out parts with `hollow`, and load what is left straight to `device`.

    Only blocks are quantized: where none is held, a quantized checkpoint is read as any other.
    Raises CheckpointError if a weight that is left is not in the checkpoint: none is ever initialised at random.
    """
    config = copy.deepcopy(checkpoint.config)
    if holds_blocks:
        check_stored(checkpoint.name, config, wanted=quantization)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    cls = _hollow_class(native_class(config), hollow)
    config._attn_implementation = None  # never what a stranger's config.json asks for
    with checkpoint.view(wanted) as view, _progress(reporter, task), _translated(checkpoint, device):
        model, info = cls.from_pretrained(
            view,
            config=config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **({} if quantization is None else {"quantization_config": quantization_config(quantization, dtype)}),
        )
    _require_complete(checkpoint, model, info)
    model.config.name_or_path = checkpoint.name
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def _hollow_class(native: type[PreTrainedModel], hollow: Callable[[PreTrainedModel], None]) -> Any:
    """A subclass that passes for `native` (its key conversions go by name), hollowed as soon as it is built."""

    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: object, **kwargs: object) -> None:
        native.__init__(self, config, *args, **kwargs)
        hollow(self)
        self._keys_to_ignore_on_load_missing = set()

    def init_weights(self: PreTrainedModel, module: nn.Module) -> None:
        """Needed for buffers that checkpoints lack. Some models reach for parts that are absent here."""
        try:
            native._init_weights(self, module)
        except AttributeError:
            if next(module.buffers(recurse=False), None) is not None:
                raise

    members = {
        "__init__": __init__,
        "_init_weights": init_weights,
        "__module__": native.__module__,
        "_keys_to_ignore_on_load_unexpected": [r".*"],
        "_tp_plan": {},
        "_pp_plan": {},
    }
    return type(native.__name__, (native,), members)


def _require_complete(checkpoint: Checkpoint, model: PreTrainedModel, info: dict[str, Any]) -> None:
    for key, stored, needed in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"the weights of {checkpoint.name} do not fit its config: {key} is {list(stored)} and not {list(needed)}; "
            "download the model again."
        )
    missing = sorted(info["missing_keys"])
    on_meta = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    lacking = missing or on_meta
    if lacking:
        raise CheckpointError(
            f"the weights of {checkpoint.name} lack {len(lacking)} tensors that are needed, {lacking[0]} among them; "
            "download the model again."
        )


@contextlib.contextmanager
def _translated(checkpoint: Checkpoint, device: torch.device) -> Iterator[None]:
    try:
        yield
    except _LOAD_ERRORS as error:
        if is_out_of_memory(error):
            raise MemoryShortage(f"the weights do not fit into the memory of {device}; give fewer --blocks.") from error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the weights of {checkpoint.name} cannot be loaded: {reason}") from error


@contextlib.contextmanager
def _progress(reporter: Reporter, task: str) -> Iterator[None]:
    """Transformers' own bars and load reports are silenced; its loop over tensors reports here."""

    def hook(factory: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        items = list(args[0]) if args else []
        with reporter.task(task, total=len(items), unit="tensors") as advance:
            for item in items:
                yield item
                advance(1)

    verbosity = hf_logging.get_verbosity()
    previous = hf_logging.set_tqdm_hook(hook)
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_tqdm_hook(previous)
        hf_logging.set_verbosity(verbosity)
