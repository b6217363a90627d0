"""What no placement could beat on the present swarm, for comparison with what is measured."""

import asyncio
import logging
from collections.abc import Callable
from statistics import fmean

from geopetals.bound import decode_bound
from geopetals.cluster import Cluster, to_problem
from geopetals.errors import GeoPetalsError

log = logging.getLogger(__name__)

_LOOK_S = 5.0


class BoundWatch:
    """Keeps the bound of the cluster that was planned for last. Computed in a thread: it may take a second."""

    def __init__(self, cluster: Callable[[], Cluster | None]) -> None:
        self._cluster = cluster
        self._of: Cluster | None = None
        self.tpot_s: float | None = None
        """Seconds per token of a session alone, pushed from server to server, mean over clients. None: not known."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            cluster = self._cluster()
            if cluster is not None and cluster is not self._of:
                self._of = cluster
                self.tpot_s = await asyncio.to_thread(bound_tpot_s, cluster)
            await asyncio.sleep(_LOOK_S)


def bound_tpot_s(cluster: Cluster) -> float | None:
    """None where no chain covers the model."""
    try:
        problem = to_problem(cluster, overhead=False)
        bounds = [decode_bound(problem, client, objective="push").decode_s for client in range(problem.num_clients)]
    except GeoPetalsError as error:
        log.info("bound.unknown reason=%s", error)
        return None
    return fmean(bounds)
