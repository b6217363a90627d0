from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.simulation import POLICIES, Arrivals, Fate, Happening, Load, Result, Scenario, World, policy, simulate
from geopetals.simulation.lengths import Lengths
from geopetals.simulation.policies import Planned, Policy
from geopetals.timing import prefill_costs, session_costs, session_s
from tests.problems import seeds
from tests.simulation.swarms import checked, make_world

__all__ = ["checked"]

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def named(name: str) -> Policy:
    chosen = policy(name)
    return replace(chosen, steps=1) if isinstance(chosen, Planned) else chosen


def conserved(result: Result) -> None:
    log, counts = result.log, result.counted
    assert sum(counts.values()) == log.arrival_s.size
    completed = log.fate == Fate.COMPLETED
    assert (log.start_s[completed] >= log.arrival_s[completed] - 1e-9).all()
    assert (log.first_s[completed] > log.start_s[completed]).all()
    assert (log.end_s[completed] >= log.first_s[completed]).all()
    assert np.isnan(log.end_s[~completed]).all()
    assert all((chain is not None) for chain, done in zip(log.chains, completed, strict=True) if done)


@quick
@given(
    seed=seeds,
    name=st.sampled_from(POLICIES),
    contention=st.booleans(),
    paper=st.booleans(),
    batching=st.sampled_from(["own", "all", "none"]),
    rate=st.sampled_from([0.05, 1.0, 20.0]),
    events=st.booleans(),
    max_wait_s=st.sampled_from([None, 0.0, 5.0]),
    duration_s=st.sampled_from([None, 10.0]),
)
@pytest.mark.usefixtures("checked")
def test_sessions_memory_and_time_are_conserved(
    seed: int,
    name: str,
    contention: bool,
    paper: bool,
    batching: str,
    rate: float,
    events: bool,
    max_wait_s: float | None,
    duration_s: float | None,
) -> None:
    world = make_world(seed % 1000)
    happenings = (
        Happening(at_s=1.0, down="0"),
        Happening(at_s=1.5, down="1"),
        Happening(at_s=3.0, up="0"),
        Happening(at_s=4.0, up="5"),
    )
    scenario = Scenario(
        load=Load(
            arrivals=Arrivals(rate_per_s=rate), sessions=None if duration_s else 60, duration_s=duration_s, warm_up=0
        ),
        events=happenings if events else None,
        mode="paper" if paper and not contention else "physical",
        contention=contention,
        batching=batching,
        max_wait_s=max_wait_s,
    )
    if duration_s is not None and rate * duration_s < 20:
        return
    try:
        result = simulate(world, scenario, named(name), seed)
    except MemoryShortage:
        return
    conserved(result)
    if duration_s is None:
        assert result.counted["in_progress"] == 0
    again = simulate(world, scenario, named(name), seed)
    assert again.summary() == pytest.approx(result.summary(), rel=0, abs=0, nan_ok=True)
    assert again.log.chains == result.log.chains


@pytest.mark.parametrize("contention", [False, True])
@pytest.mark.parametrize("name", ["petals", "paper", "geopetals"])
def test_a_session_alone_takes_what_timing_says(name: str, contention: bool) -> None:
    world = make_world(3)
    load = Load(arrivals=Arrivals(kind="constant", rate_per_s=0.001), sessions=20, warm_up=0)
    result = simulate(world, Scenario(load=load, contention=contention), named(name), 1)
    objective = "push" if name == "geopetals" else "relay"
    prefill = prefill_costs(world.problem, objective)
    for number, chain in enumerate(result.log.chains):
        assert chain is not None
        client, arrival_s = int(result.log.client[number]), result.log.arrival_s[number]
        alone_s = session_s(world.problem, client, chain, objective=objective)
        assert result.log.end_s[number] - arrival_s == pytest.approx(alone_s, rel=1e-6)
        assert result.log.first_s[number] - arrival_s == pytest.approx(prefill.chain_s(client, chain), rel=1e-6)
    assert result.summary()["wait_mean_s"] == 0


def test_without_contention_many_sessions_take_what_timing_says_after_their_wait() -> None:
    world = make_world(5, room=4.0)
    load = Load(arrivals=Arrivals(rate_per_s=20.0), sessions=200, warm_up=0)
    result = simulate(world, Scenario(load=load, contention=False), named("geopetals"), 2)
    costs = session_costs(world.problem, "push")
    alone_s = [
        costs.chain_s(int(c), chain) for c, chain in zip(result.log.client, result.log.chains, strict=True) if chain
    ]
    assert result.log.end_s - result.log.start_s == pytest.approx(alone_s, rel=1e-6)
    assert result.log.wait_s.max() > 0


def test_the_sessions_do_not_depend_on_the_policy() -> None:
    world, scenario = make_world(4), Scenario(load=Load(sessions=50))
    logs = [simulate(world, scenario, named(name), 8).log for name in ("petals", "geopetals")]
    assert (logs[0].arrival_s == logs[1].arrival_s).all()
    assert (logs[0].client == logs[1].client).all()
    assert (simulate(world, scenario, named("petals"), 9).log.arrival_s != logs[0].arrival_s).any()


@pytest.mark.parametrize("name", ["petals", "paper", "geopetals"])
@pytest.mark.parametrize("contention", [False, True])
@pytest.mark.usefixtures("checked")
def test_sessions_on_a_server_that_fails_go_on_elsewhere(name: str, contention: bool) -> None:
    world = make_world(11, servers=8, room=12.0)
    load = Load(arrivals=Arrivals(rate_per_s=4.0), sessions=80, warm_up=0)
    calm = Scenario(load=load, contention=contention)
    before = simulate(world, calm, named(name), 3)
    middle_s = float(before.log.arrival_s[40])
    used = [chain.servers for chain in before.log.chains[:40] if chain]
    busiest = max(range(8), key=lambda server: sum(server in servers for servers in used))
    result = simulate(world, replace(calm, events=(Happening(at_s=middle_s, down=str(busiest)),)), named(name), 3)
    conserved(result)
    lost = result.log.failovers > 0
    assert lost.any()
    assert result.summary()["failed_over"] == lost.sum()
    started_later = result.log.start_s >= middle_s
    for number in np.flatnonzero((lost | started_later) & (result.log.fate == Fate.COMPLETED)).tolist():
        chain = result.log.chains[number]
        assert chain is not None
        assert busiest not in chain.servers
    assert (result.log.end_s[lost & (result.log.fate == Fate.COMPLETED)] > middle_s).all()
    assert result.log.replayed_tokens[lost].sum() >= 0


@pytest.mark.parametrize("name", ["petals", "paper", "geopetals"])
@pytest.mark.usefixtures("checked")
def test_a_server_that_is_back_serves_its_blocks_and_one_that_joins_gets_some(name: str) -> None:
    world = make_world(21, servers=3, room=2.0)
    load = Load(arrivals=Arrivals(rate_per_s=1.0), sessions=60, warm_up=0)
    every = simulate(world, Scenario(load=load, contention=False), named(name), 3)
    server = next(chain for chain in every.log.chains if chain).servers[0]
    back = (Happening(at_s=10.0, down=str(server)), Happening(at_s=30.0, up=str(server)))
    new = (Happening(at_s=30.0, up=str(server)),)
    for events in (back, new):
        result = simulate(world, Scenario(load=load, events=events, contention=False), named(name), 3)
        users = [n for n, chain in enumerate(result.log.chains) if chain and server in chain.servers]
        assert (result.placement.span(server) is None) == (events is new)
        assert any(result.log.start_s[n] >= 30.0 for n in users)
        assert all(result.log.start_s[n] < 10.0 for n in users if result.log.start_s[n] < 30.0)


def test_who_would_wait_too_long_is_refused() -> None:
    world = make_world(5, room=3.0)
    load = Load(arrivals=Arrivals(rate_per_s=50.0), sessions=150, warm_up=0)
    for name in ("petals", "geopetals"):
        result = simulate(world, Scenario(load=load, contention=False, max_wait_s=2.0), named(name), 2)
        assert result.counted["refused"] > 0
        assert np.nanmax(result.log.wait_s) <= 2.0


def test_a_bare_problem_has_sessions_of_one_length() -> None:
    world = World(problem=make_world(1).problem)
    with pytest.raises(UnsupportedInput, match="depend on tokens"):
        simulate(world, Scenario(load=Load(sessions=5, output=Lengths(kind="constant", tokens=3))), "paper")
    with pytest.raises(UnsupportedInput, match="stock PETALS"):
        simulate(world, Scenario(load=Load(sessions=5)), "petals")
    with pytest.raises(UnsupportedInput, match="no policy"):
        simulate(world, Scenario(load=Load(sessions=5)), "petal")
