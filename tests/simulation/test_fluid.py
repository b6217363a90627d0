from dataclasses import replace

import numpy as np
import pytest

from geopetals.problem import Contention
from geopetals.simulation.fluid import Fluid
from tests.problems import make_problem
from tests.simulation.steps import Client, mean_step_s


def make_clients(seed: int, *, sessions: int, servers: int, links_s: float) -> list[Client]:
    rng = np.random.default_rng(seed)
    return [
        Client(
            servers=rng.permutation(servers)[: rng.integers(1, 4)].tolist(),
            blocks=rng.integers(4, 9, 3).tolist(),
            links_s=links_s * rng.uniform(0.5, 1.5),
        )
        for _ in range(sessions)
    ]


def fluid_step_s(clients: list[Client], contention: Contention, *, batched: bool) -> np.ndarray:
    problem = replace(make_problem(servers=contention.floor_s.size), contention=contention)
    fluid = Fluid(problem, batched=batched)
    block_s = contention.floor_s + contention.session_s
    for key, client in enumerate(clients):
        blocks = client.blocks[: len(client.servers)]
        work = [k if batched else k * block_s[j] for k, j in zip(blocks, client.servers, strict=True)]
        fluid.add(
            key,
            0.0,
            servers=client.servers,
            work=work,
            links_s=client.links_s,
            units=1e6,
            decode=True,
            measured=False,
        )
    for _ in range(60):
        fluid._refresh(0.0)
    return np.array([fluid.unit_s(key) for key in range(len(clients))])


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("sessions", "links_s"), [(2, 0.3), (8, 0.3), (8, 1.0), (24, 0.3), (24, 0.05), (60, 0.3)])
def test_rates_are_those_of_single_steps(sessions: int, links_s: float, batched: bool) -> None:
    """From hardly used servers to such that are always at work; floor 5 ms, 1 ms for each session."""
    contention = Contention(floor_s=np.full(6, 5e-3), session_s=np.full(6, 1e-3))
    clients = make_clients(sessions, sessions=sessions, servers=6, links_s=links_s)
    found = fluid_step_s(clients, contention, batched=batched)
    expected = mean_step_s(clients, contention, batched=batched, steps=150)
    assert found.mean() == pytest.approx(expected.mean(), rel=0.12)
    assert np.abs(found / expected - 1).mean() < 0.15
