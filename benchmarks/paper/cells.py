"""The cells of the tables: one setting each, that differs from its network's usual one in one value.

Usual: 0.4 servers per node, one in five of them fast, half a session per second, 20 + 128 tokens. Each seed draws other
nodes for client and servers, other arrivals and another order of joining. In the clustered setting seven slow servers
are at one site and two fast ones at another, 100 ms apart; the client is at a third, at the fast or at the slow one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from paper.swarm import CLUSTERED, NETWORK, Swarm, swarm_of

from geopetals.errors import UnsupportedInput
from geopetals.problem import Floats
from geopetals.simulation.sessions import Sessions
from geopetals.topology import Topology, from_topohub, parse_graph

SESSIONS = 100
NETWORKS = {"abovenet": "Abvt", "bellcanada": "Bellcanada", "gts-ce": "GtsCe"}
"""Names in the Topology Zoo."""
_SERVERS = {"abovenet": (6, 9, 15), "bellcanada": (10, 19, 26), "gts-ce": (20, 40, 60)}
_USUAL_SERVERS = {"abovenet": 9, "bellcanada": 19, "gts-ce": 60, "clustered": 9}
_RATES = (0.2, 0.5, 1.0)
_FAST = (0.1, 0.2, 0.4)
_LENGTHS = (64, 128, 256)
_SITES = ("third", "fast", "slow")
_TIGHT = {"abovenet": ((6, 0.1), (6, 0.2)), "bellcanada": ((10, 0.2),)}
"""Servers, one of them fast, and rate."""
_NEAR_S, _FAR_S = 0.005, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One column of a table."""

    network: str
    question: str
    """What is varied: usual, servers, rate, fast, length or client; or tight: few servers, but not more sessions than
    they can carry."""
    servers: int
    rate_per_s: float = 0.5
    fast_share: float = 0.2
    output_tokens: int = 128
    client: str = "third"
    """At which site, in the clustered setting only."""

    @property
    def name(self) -> str:
        """Unique: the usual cell of a network stands for itself in all questions."""
        return f"{self.network}/{self.value}"

    @property
    def value(self) -> str:
        varied = {
            "usual": "usual",
            "servers": f"{self.servers} servers",
            "rate": f"{self.rate_per_s:g}/s",
            "fast": f"{self.fast_share:.0%} fast",
            "length": f"{self.output_tokens} tokens",
            "tight": f"{self.servers} servers, {self.fast_servers} fast, {self.rate_per_s:g}/s",
            "client": f"client at {self.client} site",
        }
        return varied[self.question]

    @property
    def fast_servers(self) -> int:
        return 2 if self.network == "clustered" else round(self.fast_share * self.servers)


def all_cells() -> tuple[Cell, ...]:
    return tuple(cell for network in (*NETWORKS, "clustered") for cell in _of_network(network))


def quick_cells() -> tuple[Cell, ...]:
    """The usual cell of each network."""
    return tuple(cell for cell in all_cells() if cell.question == "usual" and cell.network != "gts-ce")


def _of_network(network: str) -> Iterator[Cell]:
    usual = Cell(network=network, question="usual", servers=_USUAL_SERVERS[network])
    yield usual
    yield from (replace(usual, question="servers", servers=n) for n in _SERVERS.get(network, ()) if n != usual.servers)
    yield from (replace(usual, question="rate", rate_per_s=rate) for rate in _RATES if rate != usual.rate_per_s)
    if network == "clustered":
        yield from (replace(usual, question="client", client=site) for site in _SITES if site != usual.client)
    else:
        yield from (replace(usual, question="fast", fast_share=share) for share in _FAST if share != usual.fast_share)
    yield from (replace(usual, question="length", output_tokens=n) for n in _LENGTHS if n != usual.output_tokens)
    yield from (
        replace(usual, question="tight", servers=servers, rate_per_s=rate, fast_share=1 / servers)
        for servers, rate in _TIGHT.get(network, ())
    )


def draw_swarm(cell: Cell, seed: int, topologies: Path | None) -> Swarm:
    """Cells of one network and seed that differ in neither servers nor client have the same places."""
    rng = np.random.default_rng([seed, 7])
    rtt_s = _clustered(cell, rng) if cell.network == "clustered" else _on_network(cell, rng, topologies)
    fast = np.arange(cell.servers) >= cell.servers - cell.fast_servers
    site = CLUSTERED if cell.network == "clustered" else NETWORK
    return swarm_of(rtt_s, fast, site=site, rate_per_s=cell.rate_per_s, output_tokens=cell.output_tokens)


def draw_sessions(cell: Cell, seed: int) -> Sessions:
    """Poisson arrivals, the first at once; rates only stretch them."""
    gaps = np.random.default_rng([seed, 8]).exponential(1.0, SESSIONS - 1)
    arrival_s = np.concatenate([[0.0], np.cumsum(gaps)]) / cell.rate_per_s
    return Sessions(client=np.zeros(SESSIONS, dtype=np.int64), arrival_s=arrival_s)


def draw_order(cell: Cell, seed: int) -> tuple[int, ...]:
    """In which servers join stock PETALS."""
    return tuple(np.random.default_rng([seed, 9]).permutation(cell.servers).tolist())


def source(network: str, topologies: Path | None) -> str | None:
    """Where the network comes from; None if it is in neither place (topohub has no GTS-CE)."""
    name = NETWORKS[network]
    if topologies is not None and (topologies / f"{name}.graph").is_file():
        return f"{name}.graph"
    try:
        return from_topohub(f"topozoo/{name}").source
    except UnsupportedInput:
        return None


@lru_cache
def _rtts_s(network: str, topologies: Path | None) -> Floats:
    """(nodes, nodes): twice the delay of the shortest path, as in the paper."""
    topology = _topology(network, topologies)
    delays: Floats = np.array([topology.delays_from(node) for node in range(len(topology.nodes))])
    return 2 * delays


def _topology(network: str, topologies: Path | None) -> Topology:
    name = NETWORKS[network]
    if topologies is not None and (file := topologies / f"{name}.graph").is_file():
        return parse_graph(file.read_text(encoding="utf-8"), source=file.name)
    return from_topohub(f"topozoo/{name}")


def _on_network(cell: Cell, rng: np.random.Generator, topologies: Path | None) -> Floats:
    """The client first. Swarms of different sizes share the first servers' places."""
    rtts_s = _rtts_s(cell.network, topologies)
    nodes = rng.permutation(len(rtts_s))[: cell.servers + 1]
    return rtts_s[np.ix_(nodes, nodes)]


def _clustered(cell: Cell, rng: np.random.Generator) -> Floats:
    """As the authors draw it: a site's round trip and up to 2 ms more."""
    place = np.array([_SITES.index(cell.client)] + [2] * (cell.servers - 2) + [1] * 2)
    jitter_s = rng.uniform(0.0, 0.001, (place.size, place.size))
    rtt_s = np.where(place[:, None] == place[None, :], _NEAR_S, _FAR_S) + jitter_s + jitter_s.T
    np.fill_diagonal(rtt_s, 0.0)
    return rtt_s
