"""benchmarks/paper_tables.py: its swarms are the paper's, its methods give the golden answers, no cell is missing."""

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from geopetals.simulation import Constants, Rules
from geopetals.simulation.sessions import Sessions

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "golden" / "cases"
GOLDEN = {
    "petals": "petals",
    "petals+order": "petals_optimized_order",
    "petals+number": "petals_optimized_number",
    "petals+routing": "petals_optimized_routing",
    "paper": "ws_rr",
}
MS = 1e-3


class Paper:
    """The modules of benchmarks/paper."""

    cells: ModuleType
    methods: ModuleType
    statistics: ModuleType
    markdown: ModuleType
    swarm: ModuleType

    def __init__(self) -> None:
        for name in ("cells", "methods", "statistics", "markdown", "swarm"):
            setattr(self, name, __import__(f"paper.{name}", fromlist=[name]))


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Paper]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield Paper()
    for name in [name for name in sys.modules if name == "paper" or name.startswith("paper.")]:
        del sys.modules[name]


def golden_case(name: str) -> dict[str, Any]:
    case: dict[str, Any] = json.loads((CASES / f"{name}.json").read_text())
    return case


@pytest.mark.parametrize("name", ["online_clustered_001", "online_clustered_002", "online_clustered_003"])
def test_paper_mode_reproduces_the_golden_times(paper: Paper, name: str) -> None:
    case = golden_case(name)
    raw, expected = case["inputs"], case["expected"]
    swarm = paper.swarm.swarm_of(
        np.array(raw["rtt_raw_ms"]) * MS,
        np.array(raw["server_type"]) == "A100",
        site=paper.swarm.CLUSTERED if "clustered" in name else paper.swarm.NETWORK,
        rate_per_s=raw["lambda_per_ms"] / MS,
        output_tokens=raw["l_max"],
    )
    load = paper.methods.design_sessions(swarm)
    assert load == expected["R_used"]
    rules = Rules(
        paper=True,
        constants=Constants(
            initial_s=raw["initial_delay_ms"] * MS,
            petals_s=raw["allocation_delay_petals_ms"] * MS,
            planned_s=raw["allocation_delay_proposed_ms"] * MS,
        ),
    )
    arrival_s = np.cumsum(np.array(raw["interarrival_ms"])) * MS
    sessions = Sessions(client=np.zeros(arrival_s.size, dtype=np.int64), arrival_s=arrival_s)
    for method, answer in GOLDEN.items():
        assert case["comparable"][answer]
        policy = paper.methods.policy_of(method, load, [server - 1 for server in raw["join_order"]])
        placement = policy.place(swarm.world, 0)
        figures = paper.methods.figures_of(paper.methods.run(swarm, policy, placement, sessions, rules))
        wanted_s = expected[answer]["sum_total_ms"] * MS / arrival_s.size / raw["l_max"]
        assert figures.per_token_s == pytest.approx(wanted_s, rel=1e-6), method
        assert figures.first_s == pytest.approx(expected[answer]["avg_ttft_ms"] * MS, rel=1e-6), method


def test_the_settings_are_the_papers_constants_and_none(paper: Paper) -> None:
    swarm = paper.cells.draw_swarm(paper.cells.quick_cells()[-1], 1, None)
    constants = {name: paper.methods.rules_of(name, swarm).constants for name in paper.methods.SETTINGS}
    assert {(each.petals_s, each.planned_s) for each in constants.values()} == {(250.0, 60.0), (0.0, 0.0)}
    rules = {name: paper.methods.rules_of(name, swarm) for name in paper.methods.SETTINGS}
    assert {(each.contention, each.constants.petals_s) for each in rules.values()} == set(
        product((False, True), (0.0, 250.0))
    )
    assert all(each.paper != each.contention for each in rules.values())


def test_cells_answer_every_question_for_every_network(paper: Paper) -> None:
    cells = paper.cells.all_cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for network in (*paper.cells.NETWORKS, "clustered"):
        asked = {cell.question for cell in cells if cell.network == network}
        mine = {"client"} if network == "clustered" else {"servers", "fast"}
        assert {"usual", "rate", "length"} | mine <= asked


def test_sessions_and_places_follow_from_the_seed(paper: Paper) -> None:
    cell = paper.cells.quick_cells()[0]
    one, same, other = (paper.cells.draw_swarm(cell, seed, None).world.problem for seed in (1, 1, 2))
    assert np.array_equal(one.relay_decode_s, same.relay_decode_s)
    assert not np.array_equal(one.relay_decode_s, other.relay_decode_s)
    assert np.array_equal(paper.cells.draw_sessions(cell, 1).arrival_s, paper.cells.draw_sessions(cell, 1).arrival_s)


def test_every_cell_has_every_method_under_every_setting(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper.cells, "SESSIONS", 8)
    monkeypatch.setattr(paper.methods, "STEPS", 20)
    cells = [paper.cells.quick_cells()[number] for number in (0, -1)]
    rounds = [paper.methods.run_round(cell, 1, None) for cell in cells]
    rows = paper.statistics.rows_of(rounds)
    assert {(row.cell, row.setting) for row in rows} == set(product(cells, paper.methods.SETTINGS))
    for row in rows:
        # NaN, where a method could not serve its sessions, would fail this, too.
        assert all(row.lone_s <= row.per_token_s[method].low * (1 + 1e-9) for method in paper.methods.METHODS)
        paired = row.against_paper["geopetals"]
        assert paired.low <= paired.value <= paired.high
        json.dumps(paper.statistics.as_json(row), allow_nan=False)
    shown = paper.markdown.markdown(rows, seeds=1, sources={})
    assert all(shown.count(f", {cell.value} | ") >= len(paper.methods.SETTINGS) for cell in cells)
    summary = paper.statistics.summary_of(rows)
    assert summary["none_cells"] == len(cells)
    assert all(np.isfinite(value) for value in summary.values())
