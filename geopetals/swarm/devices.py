"""Devices, number formats and memory of this machine, as options name them."""

import psutil
import torch

from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.units import in_units

_SHARE_OF_FREE_MEMORY = 0.8


def choose_device(name: str | None) -> torch.device:
    """The device named, or the first GPU, or the CPU. Raises UnsupportedInput if this machine has no such device."""
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise UnsupportedInput(
                f"this machine has {found} usable GPUs, so --device {name} is not there: try --device cpu."
            )
        return torch.device("cuda", device.index or 0)
    return device


def choose_dtype(name: str | None, device: torch.device, checkpoint_dtype: torch.dtype | None) -> torch.dtype:
    """The format named, or float32 on a CPU (exact and fast there) and the checkpoint's own on a GPU."""
    if name is not None:
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.float32
    if checkpoint_dtype in (torch.float16, torch.bfloat16):
        return checkpoint_dtype
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def usable_memory(device: torch.device) -> int:
    """Bytes that a server may fill when nobody says how many."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _SHARE_OF_FREE_MEMORY)
    return int(psutil.virtual_memory().available * _SHARE_OF_FREE_MEMORY)


def blocks_that_fit(memory_bytes: int, block_bytes: int, kv_bytes_per_block: int) -> int:
    return memory_bytes // (block_bytes + kv_bytes_per_block)


def check_fit(*, memory_bytes: int, num_blocks: int, block_bytes: int, kv_bytes_per_block: int) -> None:
    """Raises MemoryShortage that says how much is missing and what would fit."""
    needed = num_blocks * (block_bytes + kv_bytes_per_block)
    if needed <= memory_bytes:
        return
    fit = blocks_that_fit(memory_bytes, block_bytes, kv_bytes_per_block)
    advice = (
        f"{fit} of them would fit" if fit else "not even one fits: allow more --memory or a smaller --kv-cache-tokens"
    )
    raise MemoryShortage(
        f"{num_blocks} blocks need {in_units(num_blocks * block_bytes)} for weights and "
        f"{in_units(num_blocks * kv_bytes_per_block)} for attention cache, but {in_units(memory_bytes)} may be used; "
        f"{advice}."
    )


def process_memory_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)
