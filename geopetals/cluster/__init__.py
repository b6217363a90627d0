"""The problem as people write it: model, servers, clients, network and workload as data, without I/O."""

from geopetals.cluster.cluster import Cluster, Workload
from geopetals.cluster.errors import ClusterError
from geopetals.cluster.machines import ClientId, ClientSpec, DecodeTime, PlaceId, PrefillTime, ServerId, ServerSpec
from geopetals.cluster.model_spec import ModelSpec
from geopetals.cluster.network import GraphNetwork, Network, Place, WorldMap
from geopetals.cluster.rtt_matrix import RttMatrix
from geopetals.cluster.to_problem import to_problem

__all__ = [
    "ClientId",
    "ClientSpec",
    "Cluster",
    "ClusterError",
    "DecodeTime",
    "GraphNetwork",
    "ModelSpec",
    "Network",
    "Place",
    "PlaceId",
    "PrefillTime",
    "RttMatrix",
    "ServerId",
    "ServerSpec",
    "Workload",
    "WorldMap",
    "to_problem",
]
