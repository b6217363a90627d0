"""Small problems and placements for property tests."""

from itertools import product

import numpy as np
from hypothesis import strategies as st

from geopetals.plan import Chain, Hop, Placement
from geopetals.problem import OneWayDelays, Problem, PushDelays


def make_problem(
    seed: int = 0,
    *,
    servers: int = 5,
    blocks: int = 8,
    clients: int = 1,
    room: float = 2.0,
    push: bool = False,
    pinned: tuple[tuple[int, int] | None, ...] = (),
) -> Problem:
    """Servers hold `room` times the model together, each between half and one and a half times its share."""
    rng = np.random.default_rng(seed)
    share = room * blocks / servers
    block_bytes, kv_bytes = 1000.0, float(rng.integers(20, 200))
    return Problem(
        num_blocks=blocks,
        block_bytes=block_bytes,
        kv_bytes=kv_bytes,
        output_tokens=int(rng.integers(2, 40)),
        memory_bytes=np.maximum(np.round(rng.uniform(0.5, 1.5, servers) * share * (block_bytes + 3 * kv_bytes)), 0),
        decode_block_s=rng.uniform(0.001, 0.03, servers),
        prefill_block_s=rng.uniform(0.01, 0.2, servers),
        relay_decode_s=rng.uniform(0.01, 0.3, (clients, servers)),
        relay_prefill_s=rng.uniform(0.01, 0.4, (clients, servers)),
        demand_per_s=rng.uniform(0.01, 1.0, clients),
        push=PushDelays(decode=_delays(rng, clients, servers), prefill=_delays(rng, clients, servers))
        if push
        else None,
        pinned=pinned,
    )


def make_placement(seed: int, *, servers: int, blocks: int) -> Placement:
    """Any spans; whether they cover the model is left to chance."""
    rng = np.random.default_rng(seed)
    spans: list[tuple[int, int] | None] = []
    for _ in range(servers):
        start, end = sorted(rng.integers(0, blocks + 1, 2).tolist())
        spans.append((start, end) if start < end else None)
    return Placement.of(spans, blocks)


def all_chains(placement: Placement) -> list[Chain]:
    """Every chain over all blocks in which each server is left at its end."""
    found: list[Chain] = []
    open_paths: list[tuple[Hop, ...]] = [()]
    while open_paths:
        path = open_paths.pop()
        block = path[-1].end if path else 0
        if block == placement.num_blocks:
            found.append(Chain(path))
            continue
        for server in range(len(placement)):
            span = placement.span(server)
            if span is not None and span.start <= block < span.end:
                open_paths.append((*path, Hop(server, block, span.end)))
    return found


def _delays(rng: np.random.Generator, clients: int, servers: int) -> OneWayDelays:
    return OneWayDelays(
        from_client_s=rng.uniform(0.005, 0.15, (clients, servers)),
        between_s=rng.uniform(0.005, 0.15, (servers, servers)),
        to_client_s=rng.uniform(0.005, 0.15, (servers, clients)),
    )


seeds = st.integers(0, 2**32 - 1)
"""What the random values of a problem or placement come from."""


@st.composite
def problems(draw: st.DrawFn, *, push: bool = False, clients: int = 1) -> Problem:
    """2 to 7 servers, 2 to 10 blocks; tight to ample memory."""
    return make_problem(
        draw(seeds),
        servers=draw(st.integers(2, 7)),
        blocks=draw(st.integers(2, 10)),
        clients=clients,
        room=draw(st.sampled_from([0.8, 1.2, 2.0, 4.0])),
        push=push,
    )


def all_spans(blocks: int, most: int) -> list[tuple[int, int]]:
    """Every span of at most that many blocks."""
    return [(s, e) for s, e in product(range(blocks), range(1, blocks + 1)) if 0 < e - s <= most]
