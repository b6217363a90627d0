"""units.json: vectors for single rules."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from geopetals.placement import cg_bp, petals
from geopetals.placement.windows import ranks, weakest
from geopetals.problem import Problem
from geopetals.routing.backoff import retry_wait_s
from tests.golden.compare import close, same
from tests.golden.inputs import GB, MS


def check(case: dict[str, Any]) -> Iterator[str]:
    """The differences."""
    for row in case["retry_wait"]:
        yield from close(
            f"retry_wait({row['raw_wait_ms']})", retry_wait_s(row["raw_wait_ms"] * MS) / MS, row["wait_ms"]
        )
    for number, row in enumerate(case["block_selection"]):
        start = weakest(ranks(np.array(row["throughputs"], dtype=np.float64)), row["m"]) + 1
        yield from same(f"block_selection[{number}]", start, row["start"])
    for number, row in enumerate(case["num_blocks"]):
        problem = _one_server(row)
        servers = petals.PetalsServers(
            hidden_size=row["d_model"],
            kv_groups=row["num_key_value_groups"],
            forward_rps=np.ones(1),
            network_rps=np.ones(1),
        )
        stock = int(petals.blocks_to_hold(problem, servers)[0])
        yield from same(f"num_blocks[{number}].m_petals", stock, row["m_petals"])
        proposed = int(cg_bp.blocks_to_hold(problem, row["R"])[0])
        yield from same(f"num_blocks[{number}].m_proposed", proposed, row["m_proposed"])


def _one_server(row: dict[str, Any]) -> Problem:
    return Problem(
        num_blocks=row["L"],
        block_bytes=row["s_m_gb"] * GB,
        kv_bytes=row["s_c_gb"] * GB,
        output_tokens=2,
        memory_bytes=np.array([row["memory_gb"]]) * GB,
        decode_block_s=np.ones(1),
        prefill_block_s=np.ones(1),
        relay_decode_s=np.ones((1, 1)),
        relay_prefill_s=np.ones((1, 1)),
        demand_per_s=np.ones(1),
    )
