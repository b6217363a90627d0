"""Times of blocks on common GPUs, as ESTIMATES from their data sheets, for who has nothing measured yet.

A decode step reads the weights of a block and each session's attention cache from memory, a prefill is bound by
arithmetic: time = bytes / (memory bandwidth x MEMORY_USE) + LAUNCH_S, or operations / (dense 16-bit rate x
ARITHMETIC_USE), at two operations per parameter and token. The two uses are what such kernels commonly reach; unpacking
int8 and nf4 weights is not counted. `geopetals serve` measures the real times.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MEMORY_USE = 0.6
ARITHMETIC_USE = 0.4
LAUNCH_S = 0.3e-3  # starting the kernels of one block from Python


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Figures of the data sheet."""

    memory_bytes_per_s: float
    operations_per_s: float
    """Dense, 16-bit inputs, tensor cores where it has them."""

    def read_s(self, count_bytes: float) -> float:
        """Reading that much memory."""
        return count_bytes / (self.memory_bytes_per_s * MEMORY_USE)

    def token_s(self, parameters: float) -> float:
        """Multiplying one token with that many parameters."""
        return 2 * parameters / (self.operations_per_s * ARITHMETIC_USE)


GPUS: Mapping[str, Gpu] = {
    "gtx-1080-ti": Gpu(memory_bytes_per_s=484e9, operations_per_s=11.3e12),
    "t4": Gpu(memory_bytes_per_s=320e9, operations_per_s=65e12),
    "rtx-2080-ti": Gpu(memory_bytes_per_s=616e9, operations_per_s=54e12),
    "rtx-3060": Gpu(memory_bytes_per_s=360e9, operations_per_s=51e12),
    "rtx-3090": Gpu(memory_bytes_per_s=936e9, operations_per_s=71e12),
    "rtx-4060-ti": Gpu(memory_bytes_per_s=288e9, operations_per_s=88e12),
    "rtx-4070": Gpu(memory_bytes_per_s=504e9, operations_per_s=117e12),
    "rtx-4090": Gpu(memory_bytes_per_s=1008e9, operations_per_s=165e12),
    "rtx-5090": Gpu(memory_bytes_per_s=1792e9, operations_per_s=210e12),
    "rtx-a6000": Gpu(memory_bytes_per_s=768e9, operations_per_s=155e12),
    "v100": Gpu(memory_bytes_per_s=900e9, operations_per_s=125e12),
    "l4": Gpu(memory_bytes_per_s=300e9, operations_per_s=121e12),
    "l40s": Gpu(memory_bytes_per_s=864e9, operations_per_s=362e12),
    "a10": Gpu(memory_bytes_per_s=600e9, operations_per_s=125e12),
    "a100-40gb": Gpu(memory_bytes_per_s=1555e9, operations_per_s=312e12),
    "a100-80gb": Gpu(memory_bytes_per_s=2039e9, operations_per_s=312e12),
    "h100": Gpu(memory_bytes_per_s=3350e9, operations_per_s=989e12),
}
