"""One run: the network is measured, a prediction is written down, the load is put on, and what came of it described."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from geopetals.bench.report import result
from geopetals.bench.run import Outcome, RunRecord
from geopetals.bench.workload import Load, Request
from geopetals.bound import decode_bound
from geopetals.cluster import ServerSpec
from geopetals.cluster_io import parse_cluster
from geopetals.wan import Wan
from live import requests
from live.happenings import Timetable
from live.hosts import Pings
from live.placements import RELAYS
from live.prediction import Measured, Software, Subject, predict, with_profiles
from live.requests import ONE
from live.scenario import LiveScenario
from live.stage import Swarm
from live.translation import Live

Answer = Callable[[tuple[int, ...], int], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One system under one load; `predicted` writes a prediction down and gives its hash."""

    live: Live
    wan: Wan
    pings: Pings
    system: str
    load: str
    order: int
    rate_per_s: float
    software: Software
    answer: Answer
    predicted: Callable[[Mapping[str, Any]], str]

    def go(self, swarm: Swarm) -> dict[str, Any]:
        """Everything that is kept of it."""
        scenario, closed = self.live.scenario, self.load == ONE
        load = requests.load_of(scenario, self.live.with_demand(self.rate_per_s), self.load, self.rate_per_s)
        drawn = requests.drawn(scenario, load, order=self.order)
        timetable, statuses, known = Timetable(swarm, scenario), list[dict[str, Any]](), dict[str, Any]()

        def before() -> None:
            swarm.prepare()
            subject, facts = self._subject(swarm)
            sha256 = self.predicted(_prediction(subject, drawn, closed=closed))
            known.update(
                began_at=time.time(),
                prediction_sha256=sha256,
                spans=dict(subject.spans),
                bound_s=_bounds(subject),
                facts=facts,
            )
            self.wan.reset()
            timetable.start()

        def after() -> None:
            timetable.stop()
            statuses.append(self.wan.status())

        record = requests.run(
            [swarm.worker(host) for host in load.rates],
            drawn,
            closed=closed,
            dilation=scenario.dilation,
            before=before,
            after=after,
        )
        described = self._described(record, swarm, load, statuses[0], _names(known["facts"]))
        rate = {"rate_per_s": None if closed else self.rate_per_s}
        return {**known, **rate, "happened": timetable.done, **described}

    def _subject(self, swarm: Swarm) -> tuple[Subject, Mapping[str, Any]]:
        """The system as it is before the run."""
        facts = swarm.facts()
        cluster = with_profiles(self.live.with_demand(self.rate_per_s), _profiles(facts, self.live.scenario))
        rtts = self.pings.measure(dilation=self.live.scenario.dilation)
        clients = len(cluster.clients)
        network = Measured(rtts_s=rtts[:-1, :-1], coordinator_s=rtts[:clients, -1])
        subject = Subject(
            live=self.live,
            system=self.system,
            cluster=cluster,
            spans=swarm.spans(),
            software=self.software,
            network=network,
        )
        return subject, facts

    def _described(
        self, record: RunRecord, swarm: Swarm, load: Load, wan_status: Mapping[str, Any], names: Mapping[str, str]
    ) -> dict[str, Any]:
        scenario = self.live.scenario
        found = result(
            record,
            system=swarm.under_test,
            load=load,
            command="",
            seed=scenario.seed,
            dilation=scenario.dilation,
            goodput_ms={},
            details=False,
            wan=wan_status,
        )
        done = [outcome for outcome in record.outcomes if outcome.failure is None]
        right = all(
            list(outcome.tokens) == self.answer(outcome.request.prompt, outcome.request.output_tokens)
            for outcome in done
        )
        return {
            "summary": found["summary"],
            "failures": found["failures"],
            "verdict": found["verdict"],
            "right_tokens": right,
            "tokens_sha256": found["tokens_sha256"],
            "lateness": wan_status["run"]["lateness"],
            "overruns": {peer: device.get("overruns") for peer, device in found["emulated_devices"].items()},
            "sessions": [_session(outcome, scenario.dilation, names) for outcome in record.outcomes],
            "believed_rtts_s": {host: facts.get("rtt_s") for host, facts in record.facts_before.items()},
        }


def _prediction(subject: Subject, drawn: list[Request], *, closed: bool) -> dict[str, Any]:
    measured = [request for request in drawn if request.arrival_s is not None]
    sessions = predict(subject, measured, closed=closed)
    return {
        "sessions": [
            {"number": request.number, **session} for request, session in zip(measured, sessions, strict=True)
        ],
        "spans": dict(subject.spans),
        "rtts_s": subject.network.rtts_s.tolist(),
        "software": subject.software.to_value(),
        "blocks_s": {str(server.id): _times(server) for server in subject.cluster.servers},
    }


def _times(server: ServerSpec) -> list[float]:
    """Of a block: weights and each session of a decode step, and a prompt."""
    decode, prefill = server.decode_block, server.prefill_block
    assert decode is not None
    assert prefill is not None
    return [decode.weights_s, decode.session_s, prefill.fixed_s]


def _bounds(subject: Subject) -> dict[str, float]:
    """Of each client: network and the devices' computing alone, no software; relay where the system relays."""
    problem = subject.live.problem(rtts=subject.network.rtts_s)
    objective: Any = "relay" if subject.system in RELAYS else "push"
    names = subject.live.scenario.client_names
    return {name: decode_bound(problem, index, objective=objective).decode_s for index, name in enumerate(names)}


def _profiles(facts: Mapping[str, Any], scenario: LiveScenario) -> dict[str, dict[str, Any]]:
    """What servers measured of themselves, if a coordinator knows it; undilated."""
    if not facts.get("cluster"):
        return {}
    cluster = parse_cluster(json.dumps(facts["cluster"]), directory=Path(), is_json=True)
    found = {}
    for server in cluster.servers:
        decode, prefill = server.decode_block, server.prefill_block
        if decode is None or prefill is None:
            continue
        name = facts["names"].get(str(server.id), str(server.id))
        found[name] = {
            "decode": [decode.weights_s / scenario.dilation, decode.session_s / scenario.dilation],
            "prefill_s": prefill.for_tokens(scenario.prompt_tokens) / scenario.dilation,
        }
    return found


def _names(facts: Mapping[str, Any]) -> dict[str, str]:
    """Of servers by their peer ids, where the swarm knows them."""
    if "names" in facts:
        return dict(facts["names"])
    return {belief["peer_id"]: name for name, belief in facts.items() if "peer_id" in belief}


def _session(outcome: Outcome, dilation: float, names: Mapping[str, str]) -> dict[str, Any]:
    """In undilated seconds."""
    times = [at / dilation for at in outcome.token_s]
    whole = outcome.failure is None and len(times) > 1
    return {
        "number": outcome.request.number,
        "host": outcome.request.host,
        "arrival_s": outcome.request.arrival_s,
        "failure": outcome.failure,
        "message": outcome.message,
        "wait_s": None if outcome.wait_s is None else outcome.wait_s / dilation,
        "ttft_s": times[0] if whole else None,
        "tpot_s": (times[-1] - times[0]) / (len(times) - 1) if whole else None,
        "e2e_s": times[-1] if whole else None,
        "longest_gap_s": max(b - a for a, b in pairwise(times)) if whole else None,
        "chain": [[names.get(peer, peer[-6:]), start, end] for peer, start, end in outcome.chain],
    }
