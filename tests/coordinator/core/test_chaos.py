"""Servers and clients come, go, fail and ask at random: what must hold, holds after every event."""

import json
import random

import pytest

from geopetals.coordinator.core import Core, Settings, planner
from geopetals.coordinator.core import actions as act
from geopetals.coordinator.core import events as ev
from tests.coordinator.core import invariants
from tests.coordinator.core.virtual_swarm import MODEL, VirtualSwarm, registration

SETTINGS = Settings(
    page_tokens=8, queue_length=30, queue_per_client=10, lookahead=6, horizon_s=600.0, penalty_s=20.0, unseen_s=1e6
)


@pytest.fixture(autouse=True)
def _quick_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any plan will do here, and the search takes its time."""
    monkeypatch.setattr(planner, "METHOD", "cg_bp")


def happen(swarm: VirtualSwarm, rng: random.Random, number: int) -> None:
    """Something."""
    up = [peer for peer, machine in swarm.machines.items() if machine.up]
    kind = rng.random()
    if kind < 0.08 and len(swarm.machines) < 8:
        swarm.join(f"s{number}", random_server(rng))
    elif kind < 0.11 and len(up) > 3:
        swarm.kill(rng.choice(up))
    elif kind < 0.14 and len(up) < len(swarm.machines):
        peer = rng.choice([peer for peer in swarm.machines if peer not in up])
        swarm.join(peer, swarm.machines[peer].register)
    elif kind < 0.16 and up:
        swarm.machines[rng.choice(up)].fails = True
    elif kind < 0.18:
        swarm.tell(ev.ReplanAsked())
    elif kind < 0.22 and swarm.rtts:
        swarm.rtts[rng.choice(list(swarm.rtts))] = rng.uniform(0.005, 0.1)
    elif kind < 0.27 and swarm.sessions:
        name = rng.choice(list(swarm.sessions))
        swarm.close(name, tokens=rng.randint(1, 20))
    elif kind < 0.30 and swarm.sessions:
        name = rng.choice(list(swarm.sessions))
        swarm.tell(
            ev.SessionExtended(client=swarm.sessions[name].client, session_id=name, max_length=rng.randint(10, 200))
        )
    elif kind < 0.31:
        swarm.tell(ev.ClientLost(client=f"c{rng.randint(0, 4)}"))
    else:
        swarm.ask(f"c{rng.randint(0, 4)}", f"n{number}", prompt=rng.randint(1, 64), output=rng.randint(1, 200))


def random_server(rng: random.Random):  # type: ignore[no-untyped-def]
    return registration(
        memory_bytes=rng.randint(3, 20) * 1_000_000,
        block_s=rng.choice([0.002, 0.004, 0.01]),
        max_blocks=rng.choice([None, None, 6]),
    )


@pytest.mark.parametrize("seed", range(4))
def test_books_are_right_and_caches_never_given_twice(seed: int) -> None:
    rng = random.Random(seed)
    swarm = VirtualSwarm(settings=SETTINGS, seed=seed, check=invariants.check)
    for number in range(3):
        swarm.join(f"first{number}", random_server(rng))
    for number in range(150):
        happen(swarm, rng, number)
        swarm.run(rng.choice([0.0, 0.1, 1.0, 4.0]))
    admitted = [asked for asked in swarm.sessions.values() if asked.admitted_s is not None]
    assert len(admitted) > 10


@pytest.mark.parametrize("seed", range(2))
def test_a_restored_core_goes_on_with_the_same_actions(seed: int) -> None:
    rng = random.Random(seed)
    swarm = VirtualSwarm(settings=SETTINGS, seed=seed)
    restored = {"times": 0}

    def tell(event: ev.Event) -> tuple[act.Action, ...]:
        if rng.random() < 0.05:
            core = Core(MODEL, SETTINGS)
            core.restore(json.loads(json.dumps(swarm.core.snapshot())))
            expected = swarm.core.apply(event, swarm.now)
            assert core.apply(event, swarm.now) == expected
            assert core.snapshot() == swarm.core.snapshot()
            swarm.core, actions = core, expected
            restored["times"] += 1
        else:
            actions = swarm.core.apply(event, swarm.now)
        swarm._carry_out(actions)
        return actions

    swarm.tell = tell  # type: ignore[method-assign]
    for number in range(3):
        swarm.join(f"first{number}", random_server(rng))
    for number in range(100):
        happen(swarm, rng, number)
        swarm.run(rng.choice([0.0, 0.1, 1.0]))
    assert restored["times"] > 10
