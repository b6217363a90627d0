"""Blocks in 8 or 4 bits: Transformers' own bitsandbytes support, on CUDA and on the CPU.

`int8` is LLM.int8() (weights and inputs of linear layers in 8 bits, outlier features in 16), `nf4` keeps 4-bit
NormalFloat weights and computes in the server's dtype. Only linear layers inside blocks are quantized; embeddings,
norms and the head, which the client holds, are not.
"""

import importlib.util
import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from geopetals.errors import CheckpointError, StackError, UnsupportedInput

Quantization = Literal["int8", "nf4"]
_INSTALL = "pip install bitsandbytes"


def quantization_config(name: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Raises StackError without bitsandbytes and UnsupportedInput for another name."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise StackError(f"--quantization {name} needs bitsandbytes: run `{_INSTALL}`.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of every cast of every layer
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    raise UnsupportedInput(f"{name!r} is no quantization: choose int8 or nf4.")


def stored_quantization(config: PretrainedConfig) -> str | None:
    """How a checkpoint that is quantized already says it is (`bitsandbytes`, `gptq`, ...)."""
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown")


def check_stored(model: str, config: PretrainedConfig, *, wanted: str | None) -> None:
    """Raises CheckpointError if the checkpoint is quantized in a way that Transformers does not know, or twice."""
    stored = stored_quantization(config)
    if stored is None:
        return
    if wanted is not None:
        raise CheckpointError(f"{model} is quantized already ({stored}): leave --quantization out.")
    if not any(known == stored or known.startswith(f"{stored}_") for known in AUTO_QUANTIZER_MAPPING):
        raise CheckpointError(f"{model} is quantized by {stored!r}, which Transformers cannot load.")


def memory_bytes(model: nn.Module) -> int:
    """Weights as they lie in memory, with the scales that bitsandbytes keeps beside its parameters."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if not tensor.is_meta
    }
    return sum(storages.values())
