"""Known optima of problems with two or three servers and a few blocks: golden ones, and by exhaustive search."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from geopetals.plan import Chain, Placement
from geopetals.problem import Ints, Problem
from geopetals.timing import HopCosts
from tests.golden.inputs import MS, Inputs
from tests.problems import all_chains, all_spans

GOLDEN = sorted((Path(__file__).parent / "golden" / "cases").glob("tiny_optimum_*.json"))


def golden(path: Path) -> tuple[Problem, list[int], float]:
    """The problem, its sessions per client, the optimum in seconds. These cases count every token as a decode step."""
    case = json.loads(path.read_text())
    problem = Inputs.of(case["inputs"]).problem
    as_decode = replace(problem, prefill_block_s=problem.decode_block_s, relay_prefill_s=problem.relay_decode_s)
    each = case["inputs"]["requests_per_client"]
    return as_decode, [each] * problem.num_clients, case["expected"]["optimum"]["total_ms"] * MS


def least_cost_s(problem: Problem, costs: HopCosts, sessions: list[int]) -> float:
    """Over all placements; infinite if none carries the sessions."""
    return min((least_routing_s(problem, each, costs, sessions) for each in all_placements(problem)), default=math.inf)


def all_placements(problem: Problem) -> Iterator[Placement]:
    choices = [_spans(problem, server) for server in range(problem.num_servers)]
    for spans in product(*choices):
        placement = Placement.of(spans, problem.num_blocks)
        if placement.covers():
            yield placement


def least_routing_s(problem: Problem, placement: Placement, costs: HopCosts, sessions: list[int]) -> float:
    """Of all sessions at once; infinite if the caches do not carry them."""
    chains = all_chains(placement)
    clients = [client for client, count in enumerate(sessions) for _ in range(count)]
    options = {
        client: sorted((costs.chain_s(client, chain), _blocks(chain, len(placement))) for chain in chains)
        for client in set(clients)
    }
    return _assign(clients, options, tuple(problem.slots(placement.held).tolist()))


def _assign(
    clients: list[int], options: dict[int, list[tuple[float, tuple[int, ...]]]], free: tuple[int, ...]
) -> float:
    if not clients:
        return 0.0
    least_s = math.inf
    for cost_s, used in options[clients[0]]:
        if cost_s >= least_s:
            break
        left = tuple(have - use for have, use in zip(free, used, strict=True))
        if min(left) >= 0:
            least_s = min(least_s, cost_s + _assign(clients[1:], options, left))
    return least_s


def _blocks(chain: Chain, servers: int) -> tuple[int, ...]:
    used: Ints = np.zeros(servers, dtype=np.int64)
    for hop in chain:
        used[hop.server] += hop.blocks
    return tuple(used.tolist())


def _spans(problem: Problem, server: int) -> list[tuple[int, int] | None]:
    pin = problem.pinned[server]
    if pin is not None:
        return [pin]
    most = min(int(problem.memory_bytes[server] // problem.block_bytes), int(problem.max_blocks[server]))
    return [None, *all_spans(problem.num_blocks, most)]
