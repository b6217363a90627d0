"""Telling a full device from other failures: PyTorch says it differently on every kind of device."""

import torch


def is_out_of_memory(error: Exception) -> bool:
    """On the CPU PyTorch raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
