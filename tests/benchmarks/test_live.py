"""benchmarks/live: what runs are made of, and what they come to; without a swarm."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from geopetals.cluster.delays import rtt_s
from geopetals.errors import UnsupportedInput

ROOT = Path(__file__).parents[2]
SCENARIOS = ("a0", "a1", "a2", "b-abovenet", "b-bellcanada", "c", "d")


class Modules:
    """Of benchmarks/live, by name."""

    def __getattr__(self, name: str) -> ModuleType:
        return import_module(f"live.{name}")


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield Modules()
    for name in [name for name in sys.modules if name == "live" or name.startswith("live.")]:
        del sys.modules[name]


@pytest.fixture
def a0(live: Modules) -> Any:
    return live.translation.Live(live.scenario.load("a0"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_tiny_servers_hold_as_many_blocks_and_sessions(live: Modules, name: str) -> None:
    found = live.translation.Live(live.scenario.load(name))
    tiny, large = found.problem(), found.large
    held = np.minimum(large.memory_bytes // (large.block_bytes + large.kv_bytes), large.max_blocks)
    assert np.array_equal(np.minimum(tiny.memory_bytes // (tiny.block_bytes + tiny.kv_bytes), tiny.max_blocks), held)
    assert np.allclose(tiny.slots(held), large.slots(held), rtol=0.01, atol=1)
    assert np.array_equal(tiny.decode_block_s, large.decode_block_s)
    assert np.array_equal(tiny.prefill_block_s, large.prefill_block_s)


def test_stock_servers_hold_what_petals_holds_of_the_model_as_it_is(a0: Any) -> None:
    assert a0.stock_blocks.tolist() == [2] * 7 + [24] * 2  # 4 of 70, and 49 of 70
    assert a0.stock_cache_tokens == 4096 // 148 * a0.scenario.session_tokens


def test_orders_of_joining_are_the_same_however_many_are_asked_for(a0: Any) -> None:
    orders = a0.scenario.join_orders()
    assert replace(a0.scenario, orders=3).join_orders() == orders[:3]
    assert len({tuple(order) for order in orders}) == len(orders) == 10
    assert all(sorted(order) == sorted(a0.scenario.server_names) for order in orders)


def test_every_system_is_asked_the_same(live: Modules, a0: Any) -> None:
    load = live.requests.load_of(a0.scenario, a0.with_demand(0.1), "half", 0.1)
    assert live.requests.drawn(a0.scenario, load, order=2) == live.requests.drawn(a0.scenario, load, order=2)
    assert live.requests.drawn(a0.scenario, load, order=2) != live.requests.drawn(a0.scenario, load, order=3)


@pytest.mark.parametrize(("text", "wrong"), [("sessions: {most: 3}", "sessions"), ("speed: 3", "speed")])
def test_what_a_scenario_cannot_have_is_refused(live: Modules, tmp_path: Path, text: str, wrong: str) -> None:
    lines = (live.scenario.FOLDER / "a0.yaml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(wrong)]
    (tmp_path / "wrong.yaml").write_text("\n".join([*kept, text]))
    with pytest.raises(UnsupportedInput, match=wrong):
        live.scenario.load(tmp_path / "wrong.yaml")


def subject(live: Modules, found: Any, system: str, software: Any) -> Any:
    prediction, cluster = live.prediction, found.with_demand(0.01)
    spans = live.placements.stock_spans(found, found.scenario.join_orders()[0])
    return prediction.Subject(
        live=found,
        system=system,
        cluster=cluster,
        spans=spans,
        software=software,
        network=prediction.Measured(rtts_s=rtt_s(found.cluster), coordinator_s=np.array([0.1])),
    )


def test_a_session_alone_is_predicted_by_hand(live: Modules, a0: Any) -> None:
    """mig-3 0:2, a100-1 2:26, a100-2 26:35, by relay over 100 ms."""
    software = live.prediction.Software(hop_s=0.01, open_s=0.2, open_rtts=1.0)
    found = subject(live, a0, "stock", software)
    load = live.requests.load_of(a0.scenario, found.cluster, "one", 0.01)
    asked = [request for request in live.requests.drawn(a0.scenario, load, order=0) if request.arrival_s is not None]
    session = live.prediction.predict(found, asked, closed=True)[-1]
    assert [hop[1:] for hop in session["chain"]] == [[0, 2], [2, 26], [26, 35]]
    assert session["tpot_s"] == pytest.approx(3 * 0.11 + 2 * 2 * 0.01625 + 33 * 2 * 0.00322)
    prompt_s = 3 * 0.11 + 2 * 2 * 0.2084367 + 33 * 2 * 0.034476
    assert session["ttft_s"] == pytest.approx(0.2 + 3 * 0.1 + prompt_s)
    assert session["e2e_s"] == pytest.approx(session["ttft_s"] + 23 * session["tpot_s"])


def test_the_hash_of_a_prediction_shows_any_change(live: Modules, tmp_path: Path) -> None:
    records = live.records.Records(tmp_path, "x", seed=1, resume=False)
    sha256 = records.predict((0, "stock", "one"), {"sessions": [{"number": 1, "tpot_s": 0.5}]})
    run = {**a_run("stock", tpot_s=0.4), "prediction_sha256": sha256, "began_at": 1e12}
    predictions = live.records.read_predictions(records.predictions_file)
    assert live.fidelity.check_hashes([run], predictions) == []
    assert "after the run" in live.fidelity.check_hashes([{**run, "began_at": 0.0}], predictions)[0]
    predictions[0, "stock", "one"]["prediction"]["sessions"][0]["tpot_s"] = 0.41
    assert "is not the one" in live.fidelity.check_hashes([run], predictions)[0]
    assert "no prediction" in live.fidelity.check_hashes([run], {})[0]


def test_an_interrupted_run_goes_on(live: Modules, tmp_path: Path) -> None:
    records = live.records.Records(tmp_path, "x", seed=1, resume=False)
    records.setup["diverging_rate_per_s"] = 0.5
    records.add(a_run("stock", tpot_s=0.4), {})
    again = live.records.Records(tmp_path, "x", seed=1, resume=True)
    assert again.done() == {(0, "stock", "one")}
    assert again.setup == {"diverging_rate_per_s": 0.5}


def a_run(system: str, *, tpot_s: float, order: int = 0, accepted: bool = True) -> dict[str, Any]:
    session = {"number": 1, "host": "students", "tpot_s": tpot_s, "ttft_s": 2.0, "e2e_s": 10.0, "chain": []}
    figures = {"mean_tpot_ms": 1000 * tpot_s, "p90_ttft_ms": 2000.0, "mean_e2el_ms": 1e4, "p90_wait_ms": 1.0}
    return {
        "order": order,
        "system": system,
        "load": "one",
        "summary": {**figures, "completed": 1, "failed": 0},
        "verdict": {"accepted": accepted, "reasons": []},
        "bound_s": {"students": 0.3},
        "right_tokens": True,
        "sessions": [session],
    }


def test_medians_are_over_the_runs_that_count(live: Modules, a0: Any) -> None:
    runs = [a_run("stock", tpot_s=tpot_s, order=order) for order, tpot_s in enumerate((0.5, 0.9, 0.6))]
    runs += [a_run("geopetals", tpot_s=0.33), a_run("geopetals", tpot_s=9.0, order=1, accepted=False)]
    runs += [{"order": 3, "system": "stock", "load": "one", "failed": "blocks without a server"}]
    summary = live.summary.summarize(a0.scenario, runs)
    assert summary["one_stock_tpot_ms"] == 600
    assert (summary["one_stock_tpot_ms_min"], summary["one_stock_tpot_ms_max"]) == (500, 900)
    assert summary["one_stock_unserved"] == summary["one_geopetals_rejected"] == 1
    assert summary["one_geopetals_tpot_ms_to_stock"] == pytest.approx(0.55)
    assert summary["one_geopetals_efficiency"] == pytest.approx(0.3 / 0.33)
    met = {what: is_met for what, _, _, is_met in live.summary.targets(a0.scenario, summary)}
    assert met == {"one: TPOT / stock's at most": False, "one: efficiency at least": True}
    text = live.report.markdown(a0.scenario, summary, runs)
    assert "| geopetals | 330 (330 to 330) | 0.55 |" in text
    assert "**missed**" in text


def test_errors_and_ranking(live: Modules) -> None:
    runs = [a_run("stock", tpot_s=0.5), a_run("geopetals", tpot_s=0.25)]
    guesses = {"stock": 0.55, "geopetals": 0.24}
    predictions = {
        (0, system, "one"): {
            "prediction": {"sessions": [{"number": 1, "tpot_s": tpot_s, "ttft_s": 2.2, "e2e_s": 10.0, "chain": []}]}
        }
        for system, tpot_s in guesses.items()
    }
    summary = live.fidelity.summarize(runs, predictions)
    assert summary["one_stock_tpot_mean"] == pytest.approx(0.1)
    assert summary["one_all_tpot_mean"] == pytest.approx((0.1 + 0.04) / 2)
    assert summary["one_all_ttft_mean"] == pytest.approx(0.1)
    assert (summary["one_ranked_pairs"], summary["one_ranked_right"]) == (1, 1)
    assert "| one, stock | 10.0 / 10.0 |" in live.fidelity.markdown("x", summary)
