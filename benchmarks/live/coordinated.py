"""A swarm with a coordinator: servers join with its token alone, measure themselves, and are told their blocks."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from geopetals.bench.systems import GEOPETALS, SystemUnderTest
from geopetals.bench.workers import WorkerSpec
from live.placements import Spans
from live.stage import READY_S, SWARM, Stage, emulation
from tests.live.commands import wait_for
from tests.live.emulated_swarm import EmulatedSwarm, is_settled
from tests.live.forked import Forked

_STEADY_S = 3.0
_LINKS_S = 90.0
_LOOK_S = 0.3
_REPLAN_S = 8.0
"""Until a plan that was asked for has begun to move servers: it needs the client's start-up and the search."""


class _Programs(EmulatedSwarm):
    """With the usual log level: what is logged takes time."""

    def run(self, host: str, *words: str | Path, patches: dict[str, Any] | None = None) -> Forked:
        process = self.forks.start(*words, host=host, wan=self._wan, patches=patches)
        self.programs.append(process)
        return process


class CoordinatedSwarm:
    """With spans, servers are pinned to them; without, the coordinator places."""

    def __init__(self, stage: Stage, spans: Spans | None, *, rate_per_s: float) -> None:
        self._stage, self._pins = stage, spans
        scenario = stage.live.scenario
        self._programs = _Programs(
            stage.forks,
            stage.model,
            stage.folder,
            stage.wan,
            {
                "prompt_tokens": scenario.prompt_tokens,
                "output_tokens": scenario.output_tokens,
                "arrivals_per_s": rate_per_s / scenario.dilation,
                "page_tokens": scenario.session_tokens,
                "settle_s": 1.0,
                "settle_most_s": 5.0,
            },
        )

    @property
    def under_test(self) -> SystemUnderTest:
        return SystemUnderTest(system=GEOPETALS, model=str(self._stage.model), initial_peers=(), swarm=SWARM)

    def worker(self, host: str) -> WorkerSpec:
        spec = self.under_test.worker(host, self._stage.wan.prefix(host))
        config = {"model": str(self._stage.model), "join": self._programs.tokens["client"]}
        return replace(spec, config=config)

    def join(self, name: str) -> None:
        live = self._stage.live
        server = live.cluster.servers[live.scenario.server_names.index(name)]
        words = emulation(self._stage.device(name))
        if self._pins is not None:
            words += ["--blocks", "{}:{}".format(*self._pins[name])]
        elif server.max_blocks is not None:
            words += ["--max-blocks", str(server.max_blocks)]
        self._programs.serve(name, "--host", self._stage.wan.addresses[name], *words)

    def start(self, order: list[str]) -> None:
        """Until all serve and nothing moves. A device that is new measures itself while no other server starts: they
        share this machine's cores, as servers do not.
        """
        self._programs.start_coordinator()
        for name in order:
            if self._pins is None or name in self._pins:
                self.join(name)
                if self._stage.device(name) not in self._stage.profiled:
                    self._wait_joined(name)
                    self._stage.profiled.add(self._stage.device(name))
        self._settle()

    def prepare(self) -> None:
        """The plan takes into account where clients are, and links that were not measured when servers came."""
        deadline = time.monotonic() + _LINKS_S
        while self._programs.status()["links"]["estimated"] and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        if self._pins is None:
            state = ("--state", self._programs.state)
            self._programs.run("coordinator", "replan", *state, "--reason", "links and clients are known")
            time.sleep(_REPLAN_S)
        self._settle()

    def spans(self) -> Spans:
        servers = self._programs.status()["servers"]
        return {each["name"]: (each["span"][0], each["span"][1]) for each in servers if each["span"]}

    def facts(self) -> Mapping[str, Any]:
        status, plan = self._programs.status(), self._programs.get("/plan")
        names = {each["peer"]: each["name"] for each in status["servers"]}
        return {
            "names": names,
            "cluster": plan.get("cluster"),
            "plan": plan.get("plan"),
            "links": {key: status["links"][key] for key in ("estimated", "estimate_error_s")},
        }

    def kill(self, name: str) -> None:
        self._programs.servers[name].kill()

    def stop(self) -> None:
        self._programs.stop()

    def _wait_joined(self, name: str) -> None:
        def joined() -> bool:
            time.sleep(_LOOK_S)
            return any(each["name"] == name for each in self._programs.status()["servers"])

        wait_for(joined, timeout_s=READY_S, what=lambda: f"{name} has joined: {self._programs.printed()[-4000:]}")

    def _settle(self) -> None:
        """All serve, and nothing has changed for some seconds."""
        steady_since = [0.0]
        last: list[Any] = [None]

        def steady() -> bool:
            time.sleep(_LOOK_S)
            status = self._programs.status()
            spans = sorted((each["name"], each["span"]) for each in status["servers"])
            ready = len(spans) == len(self._programs.servers) and status["covered"] and is_settled(status)
            if not ready or spans != last[0]:
                last[0], steady_since[0] = spans, time.monotonic()
            return bool(ready and time.monotonic() - steady_since[0] >= _STEADY_S)

        wait_for(steady, timeout_s=READY_S, what=lambda: f"a settled swarm: {self._programs.printed()[-4000:]}")
