"""The swarm that the planning benchmarks share: servers of four sizes within 100 ms, and a model of 70 blocks."""

import numpy as np

from geopetals.problem import Problem

BLOCK_BYTES = 1.32e9
"""One block of BLOOM-176B in 4 bit."""
KV_BYTES = 20e6
"""About 350 tokens of it in 16 bit: 128 to generate, and a prompt."""


def large_swarm(servers: int, *, clients: int, seed: int) -> Problem:
    """GPUs with 10, 24, 40 and 80 GB; the larger ones compute faster. Delays are 20-100 ms and 18 ms overhead."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, servers, p=[0.3, 0.4, 0.2, 0.1])
    rtt_s = rng.uniform(0.02, 0.1, (clients, servers))
    return Problem(
        num_blocks=70,
        block_bytes=BLOCK_BYTES,
        kv_bytes=KV_BYTES,
        output_tokens=128,
        memory_bytes=np.array([10e9, 24e9, 40e9, 80e9])[kind] * rng.uniform(0.8, 0.95, servers),
        decode_block_s=np.array([0.016, 0.009, 0.005, 0.003])[kind] * rng.uniform(0.9, 1.2, servers),
        prefill_block_s=np.array([0.2, 0.12, 0.05, 0.03])[kind] * rng.uniform(0.9, 1.2, servers),
        relay_decode_s=rtt_s + 0.018,
        relay_prefill_s=rtt_s + 0.03,
        demand_per_s=np.full(clients, 1.0),
    )
