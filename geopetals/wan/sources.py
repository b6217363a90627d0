"""Where networks come from: cluster files, tables of RTTs, topologies."""

from itertools import permutations
from pathlib import Path

from geopetals.cluster import ClientSpec, Cluster, RttMatrix, ServerSpec
from geopetals.cluster.delays import rtt_s
from geopetals.cluster_io import load_cluster, load_rtts, load_topology
from geopetals.topology import TOPOHUB, Topology
from geopetals.wan.spec import HostSpec, LinkSpec, WanSpec


def load_spec(source: str) -> WanSpec:
    """A cluster (YAML or JSON), RTTs (CSV), a `.graph` file, or `topohub:GROUP/NAME`. Raises UnsupportedInput."""
    suffix = Path(source).suffix
    if source.startswith(TOPOHUB) or suffix == ".graph":
        return from_topology(load_topology(source))
    if suffix == ".csv":
        return from_rtts(load_rtts(source))
    return from_cluster(load_cluster(source))


def from_cluster(cluster: Cluster) -> WanSpec:
    """A host for each client, then for each server, with its line; RTTs are those that planning counts with.

    What relays add is in them: such hosts reach each other directly, only that much later. A client who is called like
    a server gets `-client` behind the name.
    """
    servers = {str(server.id) for server in cluster.servers}
    machines: tuple[ClientSpec | ServerSpec, ...] = (*cluster.clients, *cluster.servers)
    names = [f"{client.id}-client" if client.id in servers else str(client.id) for client in cluster.clients]
    names += [str(server.id) for server in cluster.servers]
    rtts = rtt_s(cluster)
    return WanSpec(
        hosts=tuple(
            HostSpec(name=name, up_bit_per_s=machine.bandwidth_bit_per_s, down_bit_per_s=machine.bandwidth_bit_per_s)
            for name, machine in zip(names, machines, strict=True)
        ),
        links={
            (names[start], names[end]): LinkSpec(rtt_s=float(rtts[start, end]))
            for start, end in permutations(range(len(names)), 2)
        },
    )


def from_rtts(matrix: RttMatrix) -> WanSpec:
    """A host for each place; pairs that are not given have no link."""
    return WanSpec(
        hosts=tuple(HostSpec(name=str(place)) for place in matrix.places),
        links={
            (str(start), str(end)): LinkSpec(rtt_s=rtt)
            for (start, end), rtt in matrix.seconds().items()
            if start != end
        },
    )


def from_topology(graph: Topology) -> WanSpec:
    """A host for each node; RTTs are those of shortest paths there and back."""
    delays = [graph.delays_from(node) for node in range(len(graph.nodes))]
    names = [name.strip() for name in graph.nodes]
    return WanSpec(
        hosts=tuple(HostSpec(name=name) for name in names),
        links={
            (names[start], names[end]): LinkSpec(rtt_s=delays[start][end] + delays[end][start])
            for start, end in permutations(range(len(names)), 2)
        },
    )
