"""Plans and bounds are the same wherever they are computed."""

import sys
from typing import Any

import msgpack
import numpy as np
import pytest

from geopetals.cluster import ServerId, ServerSpec
from geopetals.coordinator import aside
from geopetals.coordinator.bounds import bound_tpot_s
from geopetals.coordinator.core import planner
from geopetals.coordinator.core.planner import make_plan
from geopetals.coordinator.core.profile import server_spec
from geopetals.coordinator.core.subject import PlanJob, Subject
from geopetals.coordinator.core.view import Work
from geopetals.coordinator.messages import Span
from tests.coordinator.rig import FACTS, register
from tests.event_loop import in_loop


def subject_of(servers: int) -> Subject:
    rng = np.random.default_rng(servers)
    work = Work(prompt_tokens=32, output_tokens=16, arrivals_per_s=0.3, shares={"near": 0.7, "far": 0.3})
    rtts = rng.uniform(0.001, 0.2, (2 + servers, servers))
    rtts[2:] = (rtts[2:] + rtts[2:].T) / 2
    return Subject(model=FACTS, work=work, servers=tuple(map(spec, range(servers))), rtts=rtts, name="tiny")


def spec(number: int) -> ServerSpec:
    details = register(step_s=0.001 * (1 + number % 3), memory_bytes=3_000 + 500 * number)
    return server_spec(ServerId(f"server{number}"), details.profile, details.limits, FACTS)


def job_of(servers: int) -> PlanJob:
    return PlanJob(number=3, subject=subject_of(servers), holding={"server0": Span(0, 2)}, block_load_s=0.5, seed=7)


def test_a_job_is_the_same_for_another_process() -> None:
    job = job_of(5)
    again = PlanJob.from_dict(msgpack.unpackb(msgpack.packb(job.to_dict())))
    assert again.cluster == job.cluster
    assert (again.number, again.holding, again.horizon_s, again.block_load_s, again.seed) == (
        job.number,
        job.holding,
        job.horizon_s,
        job.block_load_s,
        job.seed,
    )
    assert make_plan(again) == make_plan(job)


@in_loop
async def test_another_process_makes_the_same_plan_and_the_same_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(4)
    expected, bound = make_plan(job), bound_tpot_s(job.cluster)
    assert expected.new is not None
    monkeypatch.setattr(aside, "_FEW", 0)
    monkeypatch.setattr(aside, "make_plan", None)  # it is not this process that computes
    assert await aside.plan(job) == expected
    assert await aside.bound(job.subject) == pytest.approx(bound)


@in_loop
async def test_where_no_other_process_answers_this_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "METHOD", "cg_bp")
    monkeypatch.setattr(aside, "_FEW", 0)
    job = job_of(4)
    for program in ("/nowhere/at-all", "false"):
        monkeypatch.setattr(sys, "executable", program)
        assert await aside.plan(job) == make_plan(job)
        assert await aside.bound(job.subject) is None


def test_the_cluster_of_a_subject_is_made_when_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("geopetals.coordinator.core.subject.plan_cluster", lambda *_, **__: made.append(1) or "cluster")
    subject = subject_of(3)
    assert not made
    assert subject.cluster == subject.cluster == "cluster"
    assert made == [1]
