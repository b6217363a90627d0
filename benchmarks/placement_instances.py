"""The instances that placement methods are compared on; each follows from its family, its size, its load and its seed.

Four families, none with queueing for compute:

* `sites`: BLOOM-176B (nf4, 70 blocks) on slices of A100s and whole A100s at three to five sites, as in the clustered
  setting of the paper: 5 ms round trip within a site, 100 ms between, 18 ms of overhead per hop, one client at a site.
* `map`: the same servers at random places of a map of 4,000 x 2,500 km, three clients of unlike demand.
* `home`: Llama-2-70B (nf4, 80 blocks) on gaming GPUs with 10 to 30 GB at random places, 6 ms last mile, 1 ms overhead,
  three clients.
* `random`: round trips without any geometry, 20 to 200 ms, servers of all speeds and sizes, one or two clients.

Three groups: `few` sessions (10 or 40 at once, at most half of capacity) on 9 to 25 servers; `loaded`, half or three
quarters of capacity on 9 to 50 servers; `huge`, 200 servers at a quarter and a half of capacity. Capacity is the
largest number of sessions at once that the paper's formula allows (R_max, largest_load). It follows from the length of
sessions, which is a family's: 148 tokens for `sites` (20 + 128, the paper's), 384 for `map`, 1,152 for `home`, 640 for
`random`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from geopetals.placement.load import largest_load
from geopetals.problem import Floats, OneWayDelays, Problem, PushDelays

FAMILIES = ("sites", "map", "home", "random")
SMALL_SIZES = (9, 12, 16, 20, 25)
LARGE_SIZES = (36, 50)
HUGE_SIZE = 200
FEW_SESSIONS = (10, 40)
LOADS = (0.5, 0.75)
HUGE_LOADS = (0.25, 0.5)
SEED = 20251221
_BLOOM_BLOCK_BYTES, _LLAMA_BLOCK_BYTES = 1.3234e9, 0.4815e9
_BLOOM_TOKEN_BYTES, _LLAMA_TOKEN_BYTES = 57344, 4096
"""Cache of one token in one block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Names one instance: its sessions are a number, or a share of capacity."""

    family: str
    servers: int
    seed: int
    sessions: int | None = None
    load: float | None = None

    @property
    def name(self) -> str:
        amount = f"R{self.sessions}" if self.load is None else f"{round(self.load * 100)}%"
        return f"{self.family}-{self.servers}-{amount}-{self.seed}"


def few(seeds: int = 1) -> Iterator[Spec]:
    """9 to 25 servers, 10 and 40 sessions."""
    for family, servers, seed in product(FAMILIES, SMALL_SIZES, range(SEED, SEED + seeds)):
        for sessions in FEW_SESSIONS:
            yield Spec(family=family, servers=servers, sessions=sessions, seed=seed)


def loaded(seeds: int = 1) -> Iterator[Spec]:
    """9 to 50 servers at half and three quarters of their capacity."""
    for family, servers, seed in product(FAMILIES, SMALL_SIZES + LARGE_SIZES, range(SEED, SEED + seeds)):
        for load in LOADS:
            yield Spec(family=family, servers=servers, load=load, seed=seed)


def huge(seeds: int = 1) -> Iterator[Spec]:
    """200 servers at a quarter and a half of their capacity."""
    for family, seed in product(FAMILIES, range(SEED, SEED + seeds)):
        for load in HUGE_LOADS:
            yield Spec(family=family, servers=HUGE_SIZE, load=load, seed=seed)


def make(spec: Spec) -> tuple[Problem, int]:
    """The problem and R. Instances of one family, size and seed differ in R only."""
    rng = np.random.default_rng([spec.seed, FAMILIES.index(spec.family), spec.servers])
    problem = _MAKERS[spec.family](rng, spec.servers)
    capacity = largest_load(problem)
    if spec.load is not None:
        return problem, round(spec.load * capacity)
    return problem, min(spec.sessions or 1, capacity // 2)


def _sites(rng: np.random.Generator, servers: int) -> Problem:
    sites = int(rng.integers(3, 6))
    of_server, of_client = rng.integers(0, sites, servers), rng.integers(0, sites, 1)
    place = np.concatenate([of_client, of_server])
    rtt_s = np.where(place[:, None] == place[None, :], 0.005, 0.1)
    return _bloom(rng, rtt_s, tokens=148, demand=np.ones(1))


def _map(rng: np.random.Generator, servers: int) -> Problem:
    demand = rng.uniform(0.5, 2.0, 3)
    return _bloom(rng, _rtt_on_map(rng, servers + demand.size, last_mile_s=0.001), tokens=384, demand=demand)


def _home(rng: np.random.Generator, servers: int) -> Problem:
    kind = rng.choice(4, servers, p=[0.3, 0.35, 0.25, 0.1])
    demand = rng.uniform(0.5, 2.0, 3)
    return _problem(
        rtt_s=_rtt_on_map(rng, servers + demand.size, last_mile_s=0.012),
        overhead_s=0.001,
        demand=demand,
        num_blocks=80,
        block_bytes=_LLAMA_BLOCK_BYTES,
        kv_bytes=1152 * _LLAMA_TOKEN_BYTES,
        output_tokens=128,
        memory_bytes=np.array([10.5e9, 22e9, 22e9, 30e9])[kind],
        decode_block_s=np.array([2.6e-3, 1.2e-3, 1.1e-3, 0.75e-3])[kind] * rng.uniform(0.95, 1.1, servers),
        prefill_block_s=np.array([24e-3, 9e-3, 4e-3, 3e-3])[kind],
    )


def _random(rng: np.random.Generator, servers: int) -> Problem:
    clients = int(rng.integers(1, 3))
    rtt_s = rng.uniform(0.02, 0.2, (servers + clients, servers + clients))
    return _problem(
        rtt_s=(rtt_s + rtt_s.T) / 2,
        overhead_s=0.005,
        demand=rng.uniform(0.5, 2.0, clients),
        num_blocks=70,
        block_bytes=_BLOOM_BLOCK_BYTES,
        kv_bytes=640 * _BLOOM_TOKEN_BYTES,
        output_tokens=128,
        memory_bytes=rng.uniform(9e9, 40e9, servers),
        decode_block_s=rng.uniform(3e-3, 20e-3, servers),
        prefill_block_s=rng.uniform(30e-3, 250e-3, servers),
    )


def _bloom(rng: np.random.Generator, rtt_s: Floats, *, tokens: int, demand: Floats) -> Problem:
    """At least two fast servers, a quarter on average."""
    servers = len(rtt_s) - demand.size
    fast = rng.random(servers) < 0.25
    fast[rng.permutation(servers)[:2]] = True
    return _problem(
        rtt_s=rtt_s,
        overhead_s=0.018,
        demand=demand,
        num_blocks=70,
        block_bytes=_BLOOM_BLOCK_BYTES,
        kv_bytes=tokens * _BLOOM_TOKEN_BYTES,
        output_tokens=128,
        memory_bytes=np.where(fast, 79.1e9, 9.1e9),
        decode_block_s=np.where(fast, 3.2197e-3, 16.2488e-3),
        prefill_block_s=np.where(fast, 34.476e-3, 208.4367e-3),
    )


def _rtt_on_map(rng: np.random.Generator, machines: int, *, last_mile_s: float) -> Floats:
    """Two thirds of the speed of light in vacuum, routes 1.6 times as long as straight lines."""
    places = rng.uniform(0, 1, (machines, 2)) * (4000e3, 2500e3)
    distance = np.linalg.norm(places[:, None] - places[None, :], axis=2)
    rtt_s = 2 * 1.6 * distance / 2e8 + last_mile_s
    return np.asarray(rtt_s)


def _problem(
    *,
    rtt_s: Floats,
    overhead_s: float,
    demand: Floats,
    num_blocks: int,
    block_bytes: float,
    kv_bytes: float,
    output_tokens: int,
    memory_bytes: Floats,
    decode_block_s: Floats,
    prefill_block_s: Floats,
) -> Problem:
    """rtt_s: clients first, then servers. The prompt takes as long on the wire as a token and 30 ms more."""
    clients = demand.size
    hop_s, back_s = rtt_s / 2 + overhead_s, rtt_s / 2
    decode = OneWayDelays(
        from_client_s=hop_s[:clients, clients:],
        between_s=hop_s[clients:, clients:],
        to_client_s=back_s[clients:, :clients],
    )
    prefill = OneWayDelays(
        from_client_s=decode.from_client_s + 0.015,
        between_s=decode.between_s + 0.015,
        to_client_s=decode.to_client_s + 0.015,
    )
    return Problem(
        num_blocks=num_blocks,
        block_bytes=block_bytes,
        kv_bytes=kv_bytes,
        output_tokens=output_tokens,
        memory_bytes=memory_bytes,
        decode_block_s=decode_block_s,
        prefill_block_s=prefill_block_s,
        relay_decode_s=rtt_s[:clients, clients:] + overhead_s,
        relay_prefill_s=rtt_s[:clients, clients:] + overhead_s + 0.03,
        demand_per_s=demand,
        push=PushDelays(decode=decode, prefill=prefill),
    )


_MAKERS = {"sites": _sites, "map": _map, "home": _home, "random": _random}
