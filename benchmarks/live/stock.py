"""A swarm of stock PETALS."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from geopetals.bench.stock_server import StockServer, StockServerSpec
from geopetals.bench.systems import STOCK, SystemUnderTest
from geopetals.bench.workers import WorkerSpec
from live.placements import Spans
from live.stage import READY_S, SWARM, Stage

_LOOK_S = 0.1


class StockSwarm:
    """Stock PETALS' servers; with spans they hold those, without they choose."""

    def __init__(self, stage: Stage, spans: Spans | None) -> None:
        self._stage, self._spans = stage, spans
        self._servers: dict[str, StockServer] = {}
        self._killed: list[StockServer] = []
        self._started = False
        self._peers: tuple[str, ...] = ()

    @property
    def under_test(self) -> SystemUnderTest:
        return SystemUnderTest(system=STOCK, model=str(self._stage.model), initial_peers=self._peers, swarm=SWARM)

    def worker(self, host: str) -> WorkerSpec:
        return self.under_test.worker(host, self._stage.wan.prefix(host))

    def join(self, name: str) -> None:
        if self._started:
            self._turn(name).touch()
        self._servers[name] = StockServer(self._stage.model, self._spec(name), swarm=SWARM, peers=self._peers)

    def start(self, order: list[str]) -> None:
        """They start together, as that takes long; then each measures itself and chooses its blocks in its turn."""
        names = [name for name in order if self._spans is None or name in self._spans]
        self.join(names[0])
        self._peers = (self._servers[names[0]].wait_address(READY_S),)
        for name in names[1:]:
            self.join(name)
        for name in names:
            self._turn(name).touch()
            self._wait_chosen(name)
        for name in names:
            self._servers[name].wait_online(READY_S)
        self._started = True

    def prepare(self) -> None:
        """Nobody plans."""

    def _wait_chosen(self, name: str) -> None:
        """Until others see its blocks, which it announces before it loads them."""
        deadline = time.monotonic() + READY_S
        while not self._servers[name].beliefs:
            if self._servers[name].process.poll() is not None or time.monotonic() > deadline:
                self._servers[name].wait_online(timeout_s=0.0)  # raises what there is to be said
            time.sleep(_LOOK_S)

    def spans(self) -> Spans:
        found = {}
        for name, server in self._servers.items():
            if beliefs := server.beliefs:
                found[name] = (int(beliefs[-1]["start_block"]), int(beliefs[-1]["end_block"]))
        return found

    def facts(self) -> Mapping[str, Any]:
        keys = ("peer_id", "start_block", "end_block", "throughput", "inference_rps", "forward_rps", "network_rps")
        return {
            name: {key: server.beliefs[-1].get(key) for key in keys}
            for name, server in self._servers.items()
            if server.beliefs
        }

    def kill(self, name: str) -> None:
        server = self._servers.pop(name)
        self._killed.append(server)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """All at once: each takes its time."""
        threads = [threading.Thread(target=server.stop) for server in (*self._killed, *self._servers.values())]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _spec(self, name: str) -> StockServerSpec:
        live = self._stage.live
        index = live.scenario.server_names.index(name)
        span = self._spans[name] if self._spans is not None else None
        blocks = int(live.stock_blocks[index]) if span is None else None
        cache = live.stock_cache_tokens if span is None else live.cache_tokens(index, span[1] - span[0])
        return StockServerSpec(
            span=span,
            num_blocks=blocks,
            cache_tokens=cache,
            device=replace(self._stage.device(name), memory_bytes=None),
            address=self._stage.wan.addresses[name],
            prefix=tuple(self._stage.wan.prefix(name)),
            turn=self._turn(name),
            rebalances=False,
        )

    def _turn(self, name: str) -> Path:
        return self._stage.folder / f"turn-{name}"
