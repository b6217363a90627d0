from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from geopetals.cluster import to_problem
from geopetals.cluster.errors import ClusterError
from geopetals.cluster_io import load_cluster
from geopetals.placement.cg_bp import cg_bp
from geopetals.routing.shortest import shortest_chain
from geopetals.simulation import Arrivals, Load, Scenario, World, simulate
from geopetals.simulation.lengths import Lengths
from geopetals.simulation.sessions import draw_sessions
from geopetals.simulation.trace import parse_trace
from geopetals.simulation.world import SessionTimes
from geopetals.timing import Objective, prefill_costs, session_costs

CLUSTERS = Path(__file__).parents[2] / "examples/clusters"
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:04.0000000,110,27
2023-11-16 18:17:03.5000000,4808,10
2023-11-16 18:17:06.2500000,7433,0
"""


@pytest.mark.parametrize("objective", ["relay", "push"])
@pytest.mark.parametrize("prompt", [1, 20, 300])
def test_a_prompt_of_any_length_takes_what_the_cluster_says(objective: Objective, prompt: int) -> None:
    cluster = load_cluster(CLUSTERS / "home-gpus.yaml")
    world = World.of(cluster)
    chain = shortest_chain(cg_bp(world.problem, 1).placement, session_costs(world.problem), 0)[1]
    other = to_problem(replace(cluster, workload=replace(cluster.workload, prompt_tokens=prompt)))
    times = SessionTimes(world, objective)
    expected_s = prefill_costs(other, objective).chain_s(0, chain)
    assert times.first_s(0, chain, prompt) == pytest.approx(expected_s)
    parts_s = times.first_links_s(0, chain, prompt) + sum(times.prefill_work_s(chain, prompt))
    assert parts_s == pytest.approx(expected_s)


def test_sessions_of_different_lengths_take_cache_and_time_by_their_tokens() -> None:
    cluster = load_cluster(CLUSTERS / "bloom-topology.yaml")
    load = Load(
        arrivals=Arrivals(kind="constant", rate_per_s=0.001),
        sessions=20,
        warm_up=0,
        prompt=Lengths(kind="uniform", least=10, most=900),
        output=Lengths(kind="lognormal", median=64, sigma=1.0, most=200),
    )
    result = simulate(cluster, Scenario(load=load, contention=False), "paper", 1)
    assert result.log.output_tokens.max() <= 200
    for number, chain in enumerate(result.log.chains):
        prompt, output = int(result.log.prompt_tokens[number]), int(result.log.output_tokens[number])
        own = replace(cluster.workload, prompt_tokens=prompt, output_tokens=output)
        assert chain is not None
        costs = session_costs(to_problem(replace(cluster, workload=own)))
        expected_s = costs.chain_s(int(result.log.client[number]), chain)
        assert result.log.end_s[number] - result.log.arrival_s[number] == pytest.approx(expected_s)


def test_a_trace_gives_times_and_lengths() -> None:
    trace = parse_trace(TRACE, source="trace.csv")
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 0.5, 2.75])
    assert trace.prompt_tokens.tolist() == [4808, 110, 7433]
    assert trace.output_tokens.tolist() == [10, 27, 1]
    world = World.of(load_cluster(CLUSTERS / "campus.yaml"))
    lengths = Lengths(kind="trace")
    load = Load(arrivals=Arrivals(kind="trace"), trace=trace, prompt=lengths, output=lengths, sessions=3)
    sessions = draw_sessions(load, world, 0)
    assert sessions.prompt_tokens is not None
    assert sessions.arrival_s.tolist() == trace.arrival_s.tolist()
    assert sessions.prompt_tokens.tolist() == trace.prompt_tokens.tolist()
    stretched = draw_sessions(replace(load, arrivals=Arrivals(kind="trace", rate_per_s=0.1)), world, 0)
    assert stretched.arrival_s[-1] == pytest.approx(20.0)
    others = draw_sessions(replace(load, arrivals=Arrivals(rate_per_s=1.0), sessions=50), world, 0)
    pairs = set(zip(others.prompt_tokens.tolist(), others.output_tokens.tolist(), strict=True))  # type: ignore[union-attr]
    assert pairs <= {(4808, 10), (110, 27), (7433, 1)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "no column TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n0,1,2\n1,two,3\n", "line 3 of the trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnan,1,2\n", "line 2 of the trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2\n", "line 2 of the trace"),
    ],
)
def test_a_bad_trace_is_refused(text: str, words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        parse_trace(text, source="trace.csv")


def test_poisson_and_constant_arrivals_have_their_rate() -> None:
    world = World.of(load_cluster(CLUSTERS / "campus.yaml"))
    poisson = draw_sessions(Load(arrivals=Arrivals(rate_per_s=2.0), duration_s=1000), world, 1).arrival_s
    assert poisson.size == pytest.approx(2000, rel=0.1)
    gaps_s = np.diff(poisson)
    assert gaps_s.std() == pytest.approx(gaps_s.mean(), rel=0.1)
    steady = Arrivals(kind="constant", rate_per_s=2.0)
    constant = draw_sessions(Load(arrivals=steady, duration_s=10), world, 1).arrival_s
    assert np.diff(constant) == pytest.approx(np.full(19, 0.5))
