"""How fast this server is, measured on the blocks it has just loaded, in PETALS' conventions."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from geopetals.swarm.stage import Stage

_DECODE_BUDGET_S = 0.3
_MAX_DECODE_STEPS = 20
_PREFILL_TOKENS = {"cpu": 32, "cuda": 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Tokens per second through one block: `inference_rps` when decoding, `forward_rps` in a prefill."""

    inference_rps: float
    forward_rps: float

    def of_server(self, num_blocks: int) -> float:
        """PETALS' figure for placement: a request uses (1 + num_blocks) / 2 of a server's blocks on average."""
        return self.forward_rps / ((1 + num_blocks) / 2)


def measure(stage: Stage) -> Throughput:
    """Runs decode steps for about 0.3 s and one prefill, through all blocks. For the compute thread."""
    blocks = stage.end - stage.start
    tokens = _PREFILL_TOKENS.get(stage.device.type, 32)
    kv = stage.allocate_kv(stage.start, stage.end, batch=1, max_length=tokens + _MAX_DECODE_STEPS)
    with torch.inference_mode():
        prompt = torch.zeros(1, tokens, stage.hidden_size, dtype=stage.dtype, device=stage.device)
        token = prompt[:, :1]
        _timed(stage, lambda: stage.run(token, stage.start, stage.end, kv=kv))
        kv.truncate(0)
        prefill_s = _timed(stage, lambda: stage.run(prompt, stage.start, stage.end, kv=kv))
        steps, decode_s = 0, 0.0
        while steps < _MAX_DECODE_STEPS and decode_s < _DECODE_BUDGET_S:
            decode_s += _timed(stage, lambda: stage.run(token, stage.start, stage.end, kv=kv))
            steps += 1
    return Throughput(inference_rps=blocks * steps / decode_s, forward_rps=blocks * tokens / prefill_s)


def _timed(stage: Stage, work: Callable[[], torch.Tensor]) -> float:
    began = time.perf_counter()
    work()
    if stage.device.type == "cuda":
        torch.cuda.synchronize(stage.device)
    return max(time.perf_counter() - began, 1e-9)
