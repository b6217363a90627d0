"""What a block server asks of its blocks before it serves them: the same output however they are run."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geopetals.errors import CheckpointError

if TYPE_CHECKING:
    from geopetals.swarm.kv_cache import SessionKV
    from geopetals.swarm.stage import Stage

_TOKENS = 7
_WIDEST_WINDOW_TO_CROSS = 16
EXACT = 1e-3
# In lower precision a token may go to another expert; what is wrong in structure is wrong by about 1.
COARSE = 0.5


@torch.inference_mode()
def require_consistency(stage: "Stage") -> None:
    """Raises CheckpointError unless a few tokens, in pieces and block by block, give what they give all at once.

    Blocks that keep or share something beside their caches differ, as do those in which sequences of a batch mix.
    """
    tokens = probe_tokens(stage)
    generator = torch.Generator().manual_seed(0)
    # Small, so that what the blocks add is not lost beside it in low precision.
    probe = (0.1 * torch.randn(2, tokens, stage.hidden_size, generator=generator)).to(stage.device, stage.dtype)
    whole = stage.run(probe, stage.start, stage.end)[:1].float()
    alone = probe[:1]
    kv = stage.allocate_kv(stage.start, stage.end, batch=1, max_length=tokens)
    pieces = torch.cat([_run_by_block(stage, piece, kv) for piece in alone.split((tokens - 3, 2, 1), dim=1)], dim=1)
    added = (whole - alone.float()).norm(dim=-1).clamp_min(1e-6)
    error = (pieces.float() - whole).norm(dim=-1) / added
    consistent = error.max() < EXACT if stage.computes_exactly else error[:, -3:].median() < COARSE
    if bool(consistent):
        return
    shorter = stage.run(alone[:, :-1], stage.start, stage.end).float()
    looks_ahead = (shorter - whole[:, :-1]).norm() > EXACT * added.norm()
    why = (
        "look at tokens that follow, as encoders do (is_decoder: false)"
        if bool(looks_ahead)
        else "compute something else piece by piece than all at once"
    )
    raise CheckpointError(f"the blocks of this {stage.config.model_type} {why}: it cannot be split over servers.")


def probe_tokens(stage: "Stage") -> int:
    """Tokens enough to leave a sliding window behind, unless it is wide."""
    windows = [window for window in stage.windows if window <= _WIDEST_WINDOW_TO_CROSS]
    tokens = max([_TOKENS, *(window + 4 for window in windows)])
    return tokens if stage.max_tokens is None else max(4, min(tokens, stage.max_tokens))


def _run_by_block(stage: "Stage", hidden: Tensor, kv: "SessionKV") -> Tensor:
    before = kv.length
    for block in range(stage.start, stage.end):
        kv.length = before
        hidden = stage.run(hidden, block, block + 1, kv=kv)
    return hidden
