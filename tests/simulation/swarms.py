"""Small worlds for the simulator's tests."""

from dataclasses import replace

import numpy as np
import pytest

from geopetals.placement.petals import PetalsServers
from geopetals.problem import Contention
from geopetals.routing.petals import PingTimes
from geopetals.simulation import World
from geopetals.simulation.engine import Engine
from geopetals.simulation.world import StockFacts
from tests.problems import make_problem

_BYTES = 1e4
"""The problem's memory times this, so that there is something left beside what PETALS sets aside."""


def make_world(seed: int = 0, *, servers: int = 6, blocks: int = 6, clients: int = 2, room: float = 6.0) -> World:
    """Servers know each other's delays, what several sessions cost them, and what PETALS makes of them."""
    rng = np.random.default_rng([seed, 7])
    problem = make_problem(seed, servers=servers, blocks=blocks, clients=clients, room=room, push=True)
    share = rng.uniform(0.3, 1.0, servers)
    contention = Contention(floor_s=problem.decode_block_s * share, session_s=problem.decode_block_s * (1 - share))
    stock = StockFacts(
        # With this size, PETALS' own cache holds two to five sessions for each block.
        servers=PetalsServers(
            hidden_size=100, forward_rps=1 / problem.prefill_block_s, network_rps=rng.uniform(5, 50, servers)
        ),
        pings=PingTimes(client_s=problem.relay_decode_s, between_s=rng.uniform(0.01, 0.2, (servers, servers))),
    )
    larger = replace(
        problem,
        contention=contention,
        block_bytes=problem.block_bytes * _BYTES,
        kv_bytes=problem.kv_bytes * _BYTES / 3,
        memory_bytes=problem.memory_bytes * _BYTES,
    )
    return World(problem=larger, stock=stock)


class CheckedEngine(Engine):
    """After each event: no server holds more than it has, and time has not run backwards."""

    def _arrive(self, number: int) -> None:
        super()._arrive(number)
        self._check_instant()

    def _happen(self) -> None:
        super()._happen()
        self._check_instant()

    def _done(self) -> None:
        super()._done()
        self._check_instant()

    def _check_instant(self) -> None:
        self.check()
        assert self.now >= getattr(self, "_before_s", 0.0)
        self._before_s = self.now


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every simulation of the test is checked at each of its events."""
    monkeypatch.setattr("geopetals.simulation.runs.Engine", CheckedEngine)
