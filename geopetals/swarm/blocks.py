"""Which blocks a server takes when nobody tells it: stock PETALS' rule, until a coordinator decides."""

import torch
from transformers import PretrainedConfig

from geopetals.swarm import devices
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.records import ServerRecord
from geopetals.swarm.stack import RemoteModuleInfo, ServerInfo, choose_best_blocks
from geopetals.swarm.stage import load_stage

_KV_TOKENS, _KV_TOKENS_GROUPED = 4096, 16384


def default_kv_tokens(config: PretrainedConfig) -> int:
    """PETALS' default cache: 4096 tokens for every block, 16384 with grouped attention heads."""
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    return _KV_TOKENS_GROUPED if heads is not None and groups is not None and groups < heads else _KV_TOKENS


def measured_block_bytes(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, quantization: str | None
) -> int:
    """Memory of one block's weights: from the files, or, where they are to be quantized, of a block loaded to see."""
    if quantization is None:
        return checkpoint.block_bytes(dtype)
    return load_stage(checkpoint, 0, 1, dtype=dtype, device=device, quantization=quantization).memory_bytes


def choose_blocks(
    checkpoint: Checkpoint,
    servers: list[ServerRecord],
    *,
    wanted: tuple[int, int] | None,
    count: int | None,
    block_bytes: int,
    dtype: torch.dtype,
    memory_bytes: int,
    kv_tokens: int,
) -> tuple[int, int]:
    """The half-open span to serve. Raises BlocksError outside the model and MemoryShortage for what does not fit."""
    kv_bytes = kv_tokens * kv_bytes_per_token(checkpoint.config, dtype)
    if wanted is not None:
        checkpoint.check_span(*wanted)
        count = wanted[1] - wanted[0]
    elif count is not None:
        count = min(count, checkpoint.num_blocks)
    else:
        count = min(devices.blocks_that_fit(memory_bytes, block_bytes, kv_bytes), checkpoint.num_blocks)
    devices.check_fit(
        memory_bytes=memory_bytes, num_blocks=max(count, 1), block_bytes=block_bytes, kv_bytes_per_block=kv_bytes
    )
    if wanted is not None:
        return wanted
    return _least_served(servers, count, checkpoint.num_blocks)


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Attention cache of one token in one block, from the config: an estimate until the blocks are loaded."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * groups * head_dim * dtype.itemsize)


def _least_served(servers: list[ServerRecord], count: int, num_blocks: int) -> tuple[int, int]:
    infos = [RemoteModuleInfo(uid=f"swarm.{block}", servers={}) for block in range(num_blocks)]
    for server in servers:
        info = ServerInfo(
            state=server.state, throughput=server.throughput, start_block=server.start, end_block=server.end
        )
        for block in range(server.start, server.end):
            infos[block].servers[server.peer_id] = info
    chosen = choose_best_blocks(count, infos)
    return chosen[0], chosen[-1] + 1
