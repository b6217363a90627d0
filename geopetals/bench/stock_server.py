"""Servers of stock PETALS as processes of their own, on emulated devices: see benchmarks/stock/serve.py."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from geopetals.bench.systems import STOCK_PYTHON, STOCK_SCRIPTS, require_stock, stock_environment
from geopetals.errors import SwarmFailure
from geopetals.swarm.emulation import EMULATED_NAME, DeviceSpec

Value = TypeVar("Value")
_ADDRESS = re.compile(r"'(/ip4/[\d.]+/tcp/\d+/p2p/\w+)'")
_STOP_TIMEOUT_S = 15.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class StockServerSpec:
    """`span` None: PETALS chooses the blocks, `num_blocks` of them; None: as many as fit the device's memory.

    `address` is the IPv4 address of its host; `prefix` the words that start a process there. `turn`: a file; when that
    is there, the server measures itself and chooses its blocks at once. None: after PETALS' random delay. `rebalances`:
    whether it takes other blocks later, of which its clients' sessions in progress learn by failing.
    """

    span: tuple[int, int] | None = None
    num_blocks: int | None = None
    device: DeviceSpec | None = None
    network_bit_per_s: float | None = None
    cache_tokens: int | None = None
    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    num_handlers: int = 2
    turn: Path | None = None
    rebalances: bool = True

    def arguments(self) -> list[str]:
        """Of PETALS' run_server."""
        options = {
            "--host_maddrs": f"/ip4/{self.address}/tcp/0",
            "--device": "cpu",
            "--torch_dtype": "float32",
            "--throughput": "eval",
            "--num_handlers": str(self.num_handlers),
        }
        if self.span is not None:
            options["--block_indices"] = f"{self.span[0]}:{self.span[1]}"
        if self.num_blocks is not None:
            options["--num_blocks"] = str(self.num_blocks)
        if self.cache_tokens is not None:
            options["--attn_cache_tokens"] = str(self.cache_tokens)
        if not self.rebalances:
            options["--balance_quality"] = "0"
        if self.device is not None:
            options["--public_name"] = EMULATED_NAME + json.dumps(self.device.to_dict())
        return ["--no_auto_relay", *(word for option in options.items() for word in option)]


class StockServer:
    """One running server. All that it writes stays in a temporary folder until `stop()`."""

    def __init__(
        self, model: Path, spec: StockServerSpec, *, swarm: str, peers: Sequence[str], python: Path = STOCK_PYTHON
    ) -> None:
        require_stock(python)
        self._folder = Path(tempfile.mkdtemp(prefix="gps-"))
        self._log, self._believed = self._folder / "log", self._folder / "believed"
        testbed = self._folder / "testbed.json"
        device = spec.device.to_dict() if spec.device is not None else None
        settings = {"device": device, "network_bit_per_s": spec.network_bit_per_s, "believed": str(self._believed)}
        settings["turn"] = None if spec.turn is None else str(spec.turn)
        testbed.write_text(json.dumps(settings))
        join = ["--initial_peers", *peers] if peers else ["--new_swarm"]
        command = [str(python), str(STOCK_SCRIPTS / "serve.py"), str(testbed), str(model), "--dht_prefix", swarm]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*spec.prefix, *command, *spec.arguments(), *join],
                env=stock_environment(self._folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def beliefs(self) -> list[dict[str, Any]]:
        """What it announced of itself so far, the newest last."""
        lines = self._believed.read_text().splitlines() if self._believed.exists() else []
        return [json.loads(line) for line in lines]

    def wait_address(self, timeout_s: float = 120.0) -> str:
        """Its libp2p address; known before it has measured itself and loaded its blocks."""
        return self._wait(self._find_address, "address", timeout_s)

    def wait_online(self, timeout_s: float = 300.0) -> dict[str, Any]:
        """What it announced first when it was ready."""
        return self._wait(lambda: next((b for b in self.beliefs if b["state"] == "ONLINE"), None), "blocks", timeout_s)

    def stop(self) -> None:
        """Ask it to end as Ctrl-C does, then end what is left of its group: PETALS forgets children of its own."""
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _find_address(self) -> str | None:
        for line in self._log.read_text(errors="replace").splitlines():
            if "Running a server on" in line and (found := _ADDRESS.search(line)):
                return found[1]
        return None

    def _wait(self, find: Callable[[], Value | None], what: str, timeout_s: float) -> Value:
        deadline = time.monotonic() + timeout_s
        while (found := find()) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = self._log.read_text(errors="replace")[-3000:]
                raise SwarmFailure(f"a stock server has no {what} after {timeout_s:.0f} s, or ended: {tail}")
            time.sleep(_POLL_S)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class StockSwarm:
    """Running servers, and the addresses by which clients join them."""

    servers: tuple[StockServer, ...]
    peers: tuple[str, ...]

    def beliefs(self) -> list[dict[str, Any]]:
        """The newest of each server."""
        return [server.beliefs[-1] for server in self.servers]


@contextlib.contextmanager
def stock_swarm(
    model: Path, specs: Sequence[StockServerSpec], *, swarm: str, python: Path = STOCK_PYTHON
) -> Iterator[StockSwarm]:
    """All servers online. One after another, as each chooses its blocks by those that others have."""
    with contextlib.ExitStack() as held:
        servers: list[StockServer] = []
        peers: tuple[str, ...] = ()
        chooses = any(spec.span is None for spec in specs)
        for spec in specs:
            servers.append(StockServer(model, spec, swarm=swarm, peers=peers, python=python))
            held.callback(servers[-1].stop)
            peers = peers or (servers[-1].wait_address(),)
            if chooses:
                servers[-1].wait_online()
        for server in servers:
            server.wait_online()
        yield StockSwarm(servers=tuple(servers), peers=peers)
