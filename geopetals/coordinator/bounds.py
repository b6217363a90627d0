"""What no placement could beat on the present swarm, for comparison with what is measured."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from statistics import fmean

import numpy as np

from geopetals.bound import decode_bound
from geopetals.cluster import Cluster, to_problem
from geopetals.coordinator.core.subject import Subject
from geopetals.errors import GeoPetalsError

log = logging.getLogger(__name__)

_LOOK_S = 5.0


class BoundWatch:
    """Keeps the bound of the swarm that was planned for last; `compute` may take a second."""

    def __init__(
        self, subject: Callable[[], Subject | None], compute: Callable[[Subject], Awaitable[float | None]]
    ) -> None:
        self._subject, self._compute = subject, compute
        self._of: Subject | None = None
        self.tpot_s: float | None = None
        """Seconds per token of a session alone, pushed from server to server, mean over clients. None: not known."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            subject = self._subject()
            if subject is not None and (self._of is None or not _is_same(subject, self._of)):
                self._of = subject
                self.tpot_s = await self._compute(subject)
            await asyncio.sleep(_LOOK_S)


def _is_same(one: Subject, other: Subject) -> bool:
    """But for how much is asked."""
    if one is other:
        return True
    tokens = [(each.work.prompt_tokens, each.work.output_tokens) for each in (one, other)]
    return tokens[0] == tokens[1] and one.servers == other.servers and np.array_equal(one.rtts, other.rtts)


def bound_tpot_s(cluster: Cluster) -> float | None:
    """None where no chain covers the model."""
    try:
        problem = to_problem(cluster, overhead=False)
        bounds = [decode_bound(problem, client, objective="push").decode_s for client in range(problem.num_clients)]
    except GeoPetalsError as error:
        log.info("bound.unknown reason=%s", error)
        return None
    return fmean(bounds)
