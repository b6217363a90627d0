"""What stock PETALS would do with a cluster: its placement, its routing, its cache budget, its data flow (relay)."""

from collections.abc import Sequence

import numpy as np

from geopetals.cluster import Cluster
from geopetals.cluster.delays import rtt_s
from geopetals.placement.petals import PetalsServers, blocks_to_hold, cache_slots, petals_placement
from geopetals.plan import Placement, Route
from geopetals.planning import expected
from geopetals.problem import Problem
from geopetals.routing.petals import PetalsRouter, PingTimes
from geopetals.routing.state import RouterState

_BITS = 8


class StockSwarm:
    """The servers of a cluster, running stock PETALS."""

    def __init__(self, cluster: Cluster, problem: Problem) -> None:
        self._problem = problem
        rtts, clients = rtt_s(cluster), problem.num_clients
        self.pings = PingTimes(client_s=rtts[:clients, clients:], between_s=rtts[clients:, clients:])
        self.announced = _announced(cluster, problem)
        self._held = blocks_to_hold(problem, self.announced)

    def placement(self, join_order: Sequence[int]) -> Placement:
        """Where servers settle that join in this order; blocks may stay without a server."""
        return petals_placement(self._problem, self._held, self.announced.announced_rps(self._held), join_order)

    def router(self, placement: Placement) -> PetalsRouter:
        """Stock routing with stock servers' own cache budget."""
        budget = cache_slots(self._problem, self.announced, placement.held)
        state = RouterState(self._problem, placement, slots=np.minimum(budget, self._problem.slots(placement.held)))
        return PetalsRouter(state, self.pings)

    def tpots_s(self, placement: Placement) -> tuple[float, ...]:
        """Of a session alone, by client. Raises NoChain or ServerFull."""
        router = self.router(placement)
        return tuple(
            expected.alone(self._problem, client, router.route(client, 0.0).chain, "relay").tpot_s
            for client in range(self._problem.num_clients)
        )

    def routes(self, placement: Placement, sessions: int) -> list[Route]:
        """Of that many sessions at once. Raises NoChain or ServerFull."""
        router = self.router(placement)
        return expected.admit(self._problem, router.state, lambda client: router.route(client, 0.0), sessions)


def _announced(cluster: Cluster, problem: Problem) -> PetalsServers:
    """Tokens per second through one block in a prefill, and over the server's line."""
    lines = np.array([server.bandwidth_bit_per_s or np.inf for server in cluster.servers])
    with np.errstate(divide="ignore"):
        forward_rps = cluster.workload.prompt_tokens / problem.prefill_block_s
    return PetalsServers(
        hidden_size=cluster.model.hidden_size,
        kv_groups=cluster.model.head_groups,
        forward_rps=np.minimum(forward_rps, 1e12),
        network_rps=lines / (_BITS * cluster.model.hidden_bytes_per_token),
    )
