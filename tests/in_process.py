"""A client and its chain of block servers without anything between them: stages and hollow client in one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geopetals.client.hollow import RemoteCache, load_client
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.stage import Stage, load_stage

CPU = torch.device("cpu")
Hop = tuple[tuple[int, int], tuple[int, int]]
# (blocks a server holds, blocks a session uses of them), for models of six blocks
TWO: tuple[Hop, ...] = (((0, 3), (0, 3)), ((3, 6), (3, 6)))
THREE: tuple[Hop, ...] = (((0, 2), (0, 2)), ((1, 5), (2, 4)), ((4, 6), (4, 6)))


class InProcess:
    """A client whose chain of stages is in the same process. `outputs` are the hidden states the chain answered."""

    def __init__(self, directory: Path, hops: Sequence[Hop] = THREE) -> None:
        checkpoint = Checkpoint.open(str(directory))
        self.stages: list[Stage] = [load_stage(checkpoint, *held, dtype=torch.float32, device=CPU) for held, _ in hops]
        self.spans = [used for _, used in hops]
        self.model, self.stack = load_client(checkpoint, dtype=torch.float32, device=CPU)
        self.num_blocks = checkpoint.num_blocks
        self.outputs: list[Tensor] = []

    def cache(self, batch: int, max_length: int = 128) -> RemoteCache:
        """A new session, which the client's next forward passes belong to."""
        hops = [
            (stage, span, stage.allocate_kv(*span, batch=batch, max_length=max_length))
            for stage, span in zip(self.stages, self.spans, strict=True)
        ]
        cache = RemoteCache(lambda: hops[-1][2].length, self.num_blocks)

        def call(hidden: Tensor) -> Tensor:
            order = cache.take_hypo_ids()
            for stage, span, kv in hops:
                if order is not None:
                    kv.reorder(order)
                hidden = stage.run(hidden, *span, kv=kv)
            self.outputs.append(hidden)
            return hidden

        self.stack.call = call
        self.outputs.clear()
        return cache

    def generate(self, ids: Tensor, *, rows: int = 1, **options: Any) -> Tensor:
        model: Any = self.model
        tokens: Tensor = model.generate(ids, past_key_values=self.cache(rows * len(ids)), **options)
        return tokens
