from pathlib import Path

import pytest

from geopetals.cluster.errors import ClusterError
from geopetals.cluster_io import files_in
from geopetals.errors import UnsupportedInput
from geopetals.scenario_io import load_scenario
from geopetals.simulation.scenario import Scenario

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples/scenarios").glob("*.yaml"))
GOOD = f"""
cluster: {ROOT}/examples/clusters/campus.yaml
workload: {{sessions: 10}}
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_read_and_written(path: Path) -> None:
    scenario = load_scenario(path)
    assert Scenario.from_value(scenario.to_value(), files_in(path.parent)) == scenario


BAD = [
    ("workload: {sessions: 10}", "workload: {session: 10}", "workload.session: workload has no such key: did you mean"),
    ("workload: {sessions: 10}", "workload: {}", "workload: how long the simulation goes on is open"),
    ("workload: {sessions: 10}", "workload: {sessions: 10, duration: 5 s}", "workload: how long"),
    ("sessions: 10", "sessions: 10, arrivals: {kind: poisson, rate: 5}", "workload.arrivals.rate: 5 has no unit"),
    ("sessions: 10", "sessions: 10, arrivals: poison", "workload.arrivals.kind: 'poison' is not known"),
    ("sessions: 10", "sessions: 10, arrivals: trace", "workload.arrivals: the trace is missing"),
    (
        "sessions: 10",
        "sessions: 10, prompt_tokens: {kind: uniform, least: 3}",
        "a uniform length needs most",
    ),
    (
        "sessions: 10",
        "sessions: 10, prompt_tokens: {kind: uniform, least: 3, most: 2}",
        "least: 3 is above",
    ),
    ("workload:", "mode: papers\nworkload:", "mode: 'papers' is not known"),
    ("workload:", "mode: paper\ncontention: true\nworkload:", "contention: the paper's simulator has none"),
    ("workload:", "policies: [paper, paper]\nworkload:", "policies: a policy stands there twice"),
    ("workload:", "policies: [papers]\nworkload:", "policies[0]: 'papers' is not known"),
    ("workload:", "events: [{at: 5 s}]\nworkload:", "events[0]: what happens is open"),
    ("workload:", "events: [{at: 5 s, down: nobody}]\nworkload:", "events[0].down: there is no server 'nobody'"),
    (
        "workload:",
        "events: [{at: 5 s, down: mig-a-1}, {at: 6 s, down: mig-a-1}]\nworkload:",
        "events[1].down: mig-a-1 is down already",
    ),
    ("cluster:", "clusters:", "clusters: scenario has no such key: did you mean 'cluster'?"),
    ("campus.yaml", "nowhere.yaml", "cannot be read"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), BAD, ids=[sentence for _, _, sentence in BAD])
def test_bad_scenarios_are_refused_with_the_path(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    assert old in GOOD
    file = tmp_path / "scenario.yaml"
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(UnsupportedInput) as raised:
        load_scenario(file)
    assert sentence in str(raised.value)


def test_a_fault_in_the_cluster_is_named_from_the_scenario(tmp_path: Path) -> None:
    campus = (ROOT / "examples/clusters/campus.yaml").read_text()
    (tmp_path / "cluster.yaml").write_text(campus.replace("9.1 GB", "9.1"))
    (tmp_path / "scenario.yaml").write_text("cluster: cluster.yaml\nworkload: {sessions: 5}\n")
    with pytest.raises(ClusterError, match=r"^cluster.servers\[0\].memory: 9.1 has no unit"):
        load_scenario(tmp_path / "scenario.yaml")
    (tmp_path / "scenario.yaml").write_text("workload: {sessions: 5}\n")
    with pytest.raises(ClusterError, match="scenario has no 'cluster'"):
        load_scenario(tmp_path / "scenario.yaml")
