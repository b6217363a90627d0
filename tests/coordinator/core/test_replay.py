"""What happened live happens again when the log is replayed."""

import json
import random
from dataclasses import replace as changed

import pytest

from geopetals.coordinator.core import Core, planner
from geopetals.coordinator.core import actions as act
from geopetals.coordinator.core import events as ev
from geopetals.coordinator.core.actions import action_to_dict
from geopetals.coordinator.core.events import event_to_dict
from geopetals.coordinator.core.replay import Recorded, replay, trace
from tests.coordinator.core.test_chaos import SETTINGS, happen, random_server
from tests.coordinator.core.virtual_swarm import MODEL, VirtualSwarm


@pytest.fixture(autouse=True)
def _quick_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any plan will do here, and the search takes its time."""
    monkeypatch.setattr(planner, "METHOD", "cg_bp")


def recorded(swarm: VirtualSwarm) -> list[Recorded]:
    """As it comes back from a file."""
    return [
        Recorded(
            at_s=at_s,
            event=json.loads(json.dumps(event_to_dict(event))),
            actions=tuple(json.loads(json.dumps([action_to_dict(action) for action in actions]))),
        )
        for at_s, event, actions in swarm.log
    ]


def test_a_log_replayed_gives_the_same_decisions() -> None:
    rng = random.Random(3)
    swarm = VirtualSwarm(settings=SETTINGS, seed=3)
    for number in range(3):
        swarm.join(f"first{number}", random_server(rng))
    for number in range(80):
        happen(swarm, rng, number)
        swarm.run(rng.choice([0.0, 0.1, 1.0]))
    log = recorded(swarm)
    replayed = replay(Core(MODEL, SETTINGS), log)
    assert replayed.differences == ()
    assert sum(len(actions) for _, actions in replayed.decisions) > 100
    assert len(trace(log)) == len(swarm.sessions)
    lacking = [entry for entry in log if entry.event["kind"] != "ServerReported"]
    assert replay(Core(MODEL, SETTINGS), lacking).differences, "a log that lacks something cannot give the same"


def test_plans_that_were_made_elsewhere_are_made_again() -> None:
    settings = changed(SETTINGS, plan_inline=False)
    swarm = VirtualSwarm(settings=settings, seed=3)
    rng = random.Random(3)
    asked: list[act.MakePlan] = []
    for number in range(3):
        swarm.join(f"first{number}", random_server(rng))
    while not asked:
        swarm.run(1)
        asked = [action for _, _, actions in swarm.log for action in actions if isinstance(action, act.MakePlan)]
    job = swarm.core.plan_job(asked[0].number)
    assert job is not None
    swarm.tell(ev.PlanMade(plans=planner.make_plan(job)))
    log = recorded(swarm)
    assert replay(Core(MODEL, settings), log).differences == ()
    *before, made = log
    plans = {**made.event["plans"], "sessions": made.event["plans"]["sessions"] + 1}
    forged = changed(made, event={**made.event, "plans": plans}, actions=None)
    (difference,) = replay(Core(MODEL, settings), [*before, forged]).differences
    assert difference.recorded == (plans,)
    assert difference.replayed == (made.event["plans"],)
    assert replay(Core(MODEL, settings), [*before, forged], make=None).differences == ()
