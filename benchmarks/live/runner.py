"""All runs of a scenario: for each order of joining every system, for each system every load; nothing is done twice."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geopetals.errors import GeoPetalsError, SwarmFailure
from geopetals.swarm.emulation import DeviceSpec
from geopetals.wan import Wan
from live import calibration
from live.checkpoint import local_answers, save
from live.happenings import absent_at_first
from live.hosts import Pings, hosts, network
from live.one_run import Run
from live.placements import DEMAND_MATTERS, RELAYS, STOCK, Spans, placement_of
from live.prediction import Software
from live.rates import SHARES, diverging_rate
from live.records import Records
from live.stage import Stage, Swarm
from live.summary import summarize
from live.systems import swarm
from live.translation import Live
from tests.live.forked import Forks

_RATE_ORDERS = 10
"""The rate is the same however many orders of joining are run."""
_LONE_SHARE = 0.05
"""The demand that is planned for where sessions come one at a time, in diverging rates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which systems and loads, in their order."""

    systems: Sequence[str]
    loads: Sequence[str]


def run_scenario(live: Live, wanted: Wanted, records: Records, folder: Path) -> None:
    """Everything that is wanted and not yet in the records."""
    with Forks() as forks:
        model = save(live.model, folder / "model")
        _prepare(live, wanted, records, model, forks, folder)
        bench = _Bench(live, wanted, records, model, forks, folder)
        with hosts(network(live)) as (wan, pings):
            bench.run(wan, pings)


def _prepare(live: Live, wanted: Wanted, records: Records, model: Path, forks: Forks, folder: Path) -> None:
    """What is found out once: the rates, and what software takes."""
    setup = records.setup
    if "diverging_rate_per_s" not in setup:
        setup["diverging_rate_per_s"] = diverging_rate(live, replace(live.scenario, orders=_RATE_ORDERS).join_orders())
        setup["stock_blocks"] = dict(zip(live.scenario.server_names, live.stock_blocks.tolist(), strict=True))
        setup["stock_sessions"] = live.stock_cache_tokens // live.scenario.session_tokens
        _say(f"stock PETALS' simulated wait diverges at {60 * setup['diverging_rate_per_s']:.2f} sessions a minute")
    for kind in sorted({_kind(system) for system in wanted.systems}):
        if f"software_{kind}" not in setup:
            (own := folder / f"calibration-{kind}").mkdir()
            found, runs = calibration.calibrate(kind, live, model, forks, own)
            setup[f"software_{kind}"], setup[f"calibration_{kind}"] = found.to_value(), runs
            _say(f"software of {kind}: {found.to_value()}")
    records.write(summarize(live.scenario, records.runs))


class _Bench:
    def __init__(self, live: Live, wanted: Wanted, records: Records, model: Path, forks: Forks, folder: Path) -> None:
        self._live, self._wanted, self._records = live, wanted, records
        self._model, self._forks, self._folder = model, forks, folder
        self._answer = local_answers(model)
        self._number = 0
        self._profiled: set[DeviceSpec] = set()

    def run(self, wan: Wan, pings: Pings) -> None:
        for order in range(self._live.scenario.orders):
            for system in self._wanted.systems:
                for loads in self._groups(system):
                    todo = [load for load in loads if (order, system, load) not in self._records.done()]
                    if todo:
                        self._swarm_runs(wan, pings, order, system, todo)

    def _groups(self, system: str) -> list[list[str]]:
        """Loads that one swarm carries one after another."""
        alone = system in DEMAND_MATTERS or bool(self._live.scenario.events)
        return [[load] for load in self._wanted.loads] if alone else [list(self._wanted.loads)]

    def _swarm_runs(self, wan: Wan, pings: Pings, order: int, system: str, loads: Sequence[str]) -> None:
        self._number += 1
        (folder := self._folder / str(self._number)).mkdir()
        stage = Stage(
            live=self._live,
            wan=wan,
            forks=self._forks,
            model=self._model,
            folder=folder,
            profiled=self._profiled,
        )
        absent = absent_at_first(self._live.scenario)
        names = [name for name in self._live.scenario.join_orders()[order] if name not in absent]
        rate_per_s, began = self._rate(loads[0]), time.monotonic()
        try:
            with swarm(system, stage, names, rate_per_s=rate_per_s, stock_spans=self._stock_spans(order)) as started:
                _say(f"order {order}, {system}: serves after {time.monotonic() - began:.0f} s")
                self._check_coverage(started)
                for load in loads:
                    self._one_run(started, wan, pings, order, system, load)
        except (GeoPetalsError, AssertionError) as error:
            # A system that cannot serve at all is a result, too.
            for load in loads:
                if (order, system, load) not in self._records.done():
                    self._add(order, system, load, {"failed": str(error)[-2000:]})

    def _check_coverage(self, started: Swarm) -> None:
        """Stock PETALS' clients would try again for ever."""
        gaps = placement_of(self._live, started.spans()).gaps()
        if gaps:
            raise SwarmFailure(f"blocks {', '.join(map(str, gaps))} have no server.")

    def _one_run(self, started: Swarm, wan: Wan, pings: Pings, order: int, system: str, load: str) -> None:
        run = Run(
            live=self._live,
            wan=wan,
            pings=pings,
            system=system,
            load=load,
            order=order,
            rate_per_s=self._rate(load),
            software=Software(**self._records.setup[f"software_{_kind(system)}"]),
            answer=self._answer,
            predicted=lambda prediction: self._records.predict((order, system, load), prediction),
        )
        self._add(order, system, load, run.go(started))

    def _add(self, order: int, system: str, load: str, found: Mapping[str, Any]) -> None:
        run = {"order": order, "system": system, "load": load, **found}
        self._records.add(run, summarize(self._live.scenario, [*self._records.runs, run]))
        _say(f"order {order}, {system}, {load}: {_in_short(run)}")

    def _rate(self, load: str) -> float:
        """Sessions per second that are planned for; under load, those that come."""
        return float(self._records.setup["diverging_rate_per_s"]) * SHARES.get(load, _LONE_SHARE)

    def _stock_spans(self, order: int) -> Spans | None:
        for run in self._records.runs:
            if run["order"] == order and run["system"] == STOCK and run.get("spans"):
                return {name: (start, end) for name, (start, end) in run["spans"].items()}
        return None


def _kind(system: str) -> str:
    return calibration.STOCK if system in RELAYS else calibration.OWN


def _in_short(run: Mapping[str, Any]) -> str:
    if "failed" in run:
        return f"could not serve: {run['failed'][-300:]}"
    summary, verdict = run["summary"], run["verdict"]
    shown = [f"{name} {summary[f'median_{name}_ms'] or float('nan'):.0f} ms" for name in ("tpot", "ttft")]
    state = "" if verdict["accepted"] else f"; REJECTED: {'; '.join(verdict['reasons'])}"
    right = "" if run["right_tokens"] else "; WRONG TOKENS"
    return f"{', '.join(shown)}, {summary['failed']} failed{right}{state}"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
