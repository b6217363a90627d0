"""The blocks that a server holds, and how it comes by them."""

import gc
import time
from dataclasses import dataclass, field

import torch

from geopetals.progress import Reporter
from geopetals.swarm import devices
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.compute import ComputeThread, Priority
from geopetals.swarm.emulated_stage import emulate
from geopetals.swarm.emulation import EmulatedDevice
from geopetals.swarm.stage import Stage, load_stage


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Holding:
    """Loaded blocks. `kv_tokens` is how many tokens each of them can hold over all sessions; `load_s` as measured."""

    stage: Stage
    block_hashes: dict[int, str]
    kv_tokens: int
    load_s: float

    @property
    def span(self) -> tuple[int, int]:
        return self.stage.start, self.stage.end

    @property
    def num_blocks(self) -> int:
        return self.stage.end - self.stage.start

    @property
    def block_tokens(self) -> int:
        return self.kv_tokens * self.num_blocks

    @property
    def kv_bytes(self) -> int:
        return self.stage.kv_bytes_per_token() * self.block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Loads spans of one model for one device.

    `memory_bytes` limits weights and attention cache together. Cache takes what weights leave, but no more than
    `kv_tokens` in each block if that is given.
    """

    checkpoint: Checkpoint
    compute: ComputeThread
    reporter: Reporter
    device: torch.device
    dtype: torch.dtype
    quantization: str | None
    memory_bytes: int
    kv_tokens: int | None
    emulated: EmulatedDevice | None = None
    hashes: dict[int, str] = field(default_factory=dict)
    """Of all blocks that were ever loaded."""

    async def load(self, start: int, end: int) -> Holding:
        """Raises BlocksError, CheckpointError and MemoryShortage."""
        began = time.monotonic()
        stage = await self.compute.run(lambda: self.load_stage(start, end), Priority.BATCH)
        if self.emulated is not None:
            stage = emulate(stage, self.emulated)
        hashes = await self.compute.run(lambda: self._hash(start, end), Priority.BATCH)
        load_s = time.monotonic() - began
        return Holding(stage=stage, block_hashes=hashes, kv_tokens=self._room(stage), load_s=load_s)

    def load_stage(self, start: int, end: int) -> Stage:
        """For the compute thread; on the real device. Frees what was given up first."""
        gc.collect()  # models refer to themselves
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return load_stage(
            self.checkpoint,
            start,
            end,
            dtype=self.dtype,
            device=self.device,
            quantization=self.quantization,
            reporter=self.reporter,
        )

    def _hash(self, start: int, end: int) -> dict[int, str]:
        missing = [block for block in range(start, end) if block not in self.hashes]
        size = self.checkpoint.block_bytes(self.dtype)
        with self.reporter.task(f"weights {start}:{end} hashed", total=size * len(missing)) as advance:
            for block in missing:
                self.hashes[block] = self.checkpoint.block_hash(block)
                advance(size)
        return {block: self.hashes[block] for block in range(start, end)}

    def _room(self, stage: Stage) -> int:
        """Tokens of cache for each block. Raises MemoryShortage if there is no room for any."""
        blocks, token_bytes = stage.end - stage.start, stage.kv_bytes_per_token()
        left = (self.memory_bytes - stage.memory_bytes) // (blocks * token_bytes)
        if left < 1:
            devices.check_fit(
                memory_bytes=self.memory_bytes,
                num_blocks=blocks,
                block_bytes=stage.memory_bytes // blocks,
                kv_bytes_per_block=token_bytes,
            )
        return left if self.kv_tokens is None else min(left, self.kv_tokens)
