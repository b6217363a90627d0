"""Servers join with nothing, are given blocks, serve, and sessions come and go."""

from geopetals.coordinator.core.actions import Admitted
from tests.coordinator.core.virtual_swarm import VirtualSwarm, registration


def test_servers_join_and_a_session_is_served() -> None:
    swarm = VirtualSwarm()
    swarm.join("s1", registration(memory_bytes=8_000_000))
    swarm.run(5)
    assert swarm.serving()[0] == 1
    swarm.join("s2", registration(memory_bytes=8_000_000))
    swarm.run_until(lambda: all(swarm.serving()))
    actions = swarm.ask("c1", "one")
    assert any(isinstance(action, Admitted) for action in actions), actions
    swarm.run(20)
    assert swarm.sessions["one"].closed_s is not None
