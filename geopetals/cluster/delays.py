"""Round-trip times between all machines of a cluster, clients first, from its network."""

import math
import random
from collections.abc import Sequence

import numpy as np

from geopetals.cluster.cluster import Cluster
from geopetals.cluster.errors import Called, ClusterError
from geopetals.cluster.machines import ClientSpec, ServerSpec
from geopetals.cluster.network import GraphNetwork, WorldMap
from geopetals.cluster.rtt_matrix import RttMatrix
from geopetals.problem import Floats
from geopetals.topology import FIBRE_KM_PER_S, Topology, great_circle_km

Hosts = Sequence[ClientSpec | ServerSpec]


def rtt_s(cluster: Cluster) -> Floats:
    """(C + J, C + J): RTTs in seconds, clients first; infinite without a link, 0 from a machine to itself.

    What relays add is in it. Raises ClusterError for RTTs that are not known and for machines without any connection.
    """
    hosts: Hosts = (*cluster.clients, *cluster.servers)
    network = cluster.network
    if network.rtt is not None:
        rtts = _measured(network.rtt, hosts)
    elif network.map is not None:
        rtts = _on_map(network.map, hosts)
    else:
        assert network.graph is not None, "Network has one of three"
        rtts = _on_graph(network.graph, cluster)
    relayed = np.array([getattr(host, "relayed", False) for host in hosts])
    rtts += (network.relay_extra_s or 0.0) * (relayed[:, None] | relayed[None, :])
    np.fill_diagonal(rtts, 0.0)
    return rtts


def nodes(network: GraphNetwork, cluster: Cluster) -> list[int]:
    """The node at which each machine stands, clients first. Raises ClusterError for names that are no nodes."""
    hosts: Hosts = (*cluster.clients, *cluster.servers)
    found = [None if host.place is None else _node(network.topology, host) for host in hosts]
    free = iter(_shuffled(len(network.topology.nodes), found, network.seed))
    return [next(free) if node is None else node for node in found]


def _measured(matrix: RttMatrix, hosts: Hosts) -> Floats:
    given = matrix.seconds()
    places = [host.place or host.id for host in hosts]
    rtts = np.zeros((len(hosts), len(hosts)))
    for row, start in enumerate(places):
        for column, end in enumerate(places):
            if row != column:
                rtts[row, column] = _given(given.get((start, end)), start, end)  # type: ignore[arg-type]
    return rtts


def _given(found_s: float | None, start: str, end: str) -> float:
    if found_s is None:
        raise ClusterError(
            ("network", "rtt"),
            f"the RTT from {start} to {end} is not given: add it, or write `none` if they cannot reach each other.",
        )
    return found_s


def _on_map(world: WorldMap, hosts: Hosts) -> Floats:
    points = {place.id: (place.latitude, place.longitude) for place in world.places}
    at = [points[host.place or host.id] for host in hosts]  # type: ignore[index]
    km = np.array([[great_circle_km(one, other) for other in at] for one in at])
    return np.asarray(2 * world.inflation * km / FIBRE_KM_PER_S + 2 * world.last_mile_s)


def _on_graph(network: GraphNetwork, cluster: Cluster) -> Floats:
    at = nodes(network, cluster)
    delays = {node: network.topology.delays_from(node) for node in set(at)}
    one_way = np.array([[delays[start][end] for end in at] for start in at])
    if np.isinf(one_way).any():
        start, end = (network.topology.nodes[at[int(index)]] for index in np.argwhere(np.isinf(one_way))[0])
        raise ClusterError(
            ("network", "topology"), f"no path leads from {start} to {end}: place all machines in one connected part."
        )
    return np.asarray((one_way + one_way.T) * network.factor + 2 * network.last_mile_s)


def _node(topology: Topology, host: ClientSpec | ServerSpec) -> int:
    node = topology.index(host.place or "")
    if node is None:
        kind = "servers" if isinstance(host, ServerSpec) else "clients"
        shown = ", ".join(topology.nodes[:8])
        raise ClusterError(
            (kind, Called(host.id), "place"), f"the topology has no node {host.place!r}: use one of {shown}, …"
        )
    return node


def _shuffled(count: int, taken: Sequence[int | None], seed: int) -> list[int]:
    """Nodes for all who have none, in random order, free ones first. Only random() is the same in every Python."""
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < len(taken):
        pool = list(range(count))
        for last in range(count - 1, 0, -1):
            other = math.floor(rng.random() * (last + 1))
            pool[last], pool[other] = pool[other], pool[last]
        order += pool if order else sorted(pool, key=lambda node: node in taken)
    return order
