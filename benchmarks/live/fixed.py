"""A swarm of our servers that hold given blocks, without a coordinator."""

from collections.abc import Callable, Mapping
from typing import Any

from geopetals.bench.systems import GEOPETALS, SystemUnderTest
from geopetals.bench.workers import WorkerSpec
from geopetals.join_token import JoinToken
from live.placements import Spans
from live.stage import READY_S, SWARM, Stage, emulation
from tests.live.forked import Forked


class FixedSwarm:
    """Our servers with given blocks, without a coordinator."""

    def __init__(self, stage: Stage, spans: Spans, cache_tokens: Callable[[str], int]) -> None:
        self._stage, self._spans, self._cache_tokens = stage, spans, cache_tokens
        self._servers: dict[str, Forked] = {}
        self._token: str | None = None

    @property
    def under_test(self) -> SystemUnderTest:
        assert self._token is not None
        peers = JoinToken.decode(self._token).peers
        return SystemUnderTest(system=GEOPETALS, model=str(self._stage.model), initial_peers=peers, swarm=SWARM)

    def worker(self, host: str) -> WorkerSpec:
        return self.under_test.worker(host, self._stage.wan.prefix(host))

    def join(self, name: str) -> None:
        start, end = self._spans[name]
        words = ["serve", str(self._stage.model), "--dht-prefix", SWARM, "--blocks", f"{start}:{end}"]
        words += ["--kv-cache-tokens", str(self._cache_tokens(name)), "--host", self._stage.wan.addresses[name]]
        words += emulation(self._stage.device(name)) + (["--join", self._token] if self._token else [])
        self._servers[name] = self._stage.forks.start(*words, host=name, wan=self._stage.wan)

    def start(self, order: list[str]) -> None:
        for name in order:
            if name in self._spans:
                self.join(name)
                if self._token is None:
                    self._token = self._wait(name)
        for name in self._servers:
            self._wait(name)

    def prepare(self) -> None:
        """Nobody plans."""

    def spans(self) -> Spans:
        return {name: self._spans[name] for name in self._servers}

    def facts(self) -> Mapping[str, Any]:
        return {}

    def kill(self, name: str) -> None:
        self._servers.pop(name).kill()

    def stop(self) -> None:
        for server in self._servers.values():
            server.kill()

    def _wait(self, name: str) -> str:
        return self._servers[name].wait_line(r"--join (\S+)", timeout_s=READY_S)[1]
