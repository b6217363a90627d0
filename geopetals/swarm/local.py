"""A whole swarm on one machine: block servers forked from one preloaded process. Imports no torch itself."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import geopetals.errors
from geopetals.errors import GeoPetalsError, SwarmFailure, UnsupportedInput
from geopetals.progress import Reporter, Silent
from geopetals.swarm.private_folders import sweep_stale_folders

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalServer:
    """A running block server of a local swarm. Sizes in bytes; `ready_s` is the time from its fork until it serves."""

    number: int
    pid: int
    p2pd_pid: int
    peer_id: str
    start: int
    end: int
    weights_bytes: int
    kv_bytes: int
    process_bytes: int
    ready_s: float
    token: str


def even_spans(num_blocks: int, servers: int) -> list[tuple[int, int]]:
    """Half-open spans of equal length, the longer ones first."""
    if not 1 <= servers <= num_blocks:
        raise UnsupportedInput(f"{num_blocks} blocks can be split over 1 to {num_blocks} servers, not {servers}.")
    length, longer = divmod(num_blocks, servers)
    spans, start = [], 0
    for number in range(servers):
        end = start + length + (number < longer)
        spans.append((start, end))
        start = end
    return spans


class LocalSwarm:
    """Servers on loopback. Use as a context manager: every process is gone when it is left, however it is left."""

    def __init__(
        self, model: str, *, revision: str | None = None, reporter: Reporter | None = None, **options: Any
    ) -> None:
        """`options` are fields of ServerConfig that all servers share, as dtype or kv_cache_tokens, in JSON's types:
        `emulate` is DeviceSpec.to_dict().
        """
        self.model = model
        self._revision = revision
        self._options = {key: value for key, value in options.items() if value is not None}
        self._reporter = reporter or Silent()
        self._servers: dict[int, LocalServer] = {}
        self._ended: set[int] = set()
        self._pids: dict[int, int] = {}
        self._forked_at: dict[int, float] = {}
        self._next = 0
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.preload_s = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "geopetals.swarm.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C ends this process, which then ends the servers in order
        )
        self._reader = threading.Thread(target=self._read_events, name="geopetals-local-swarm", daemon=True)
        self._reader.start()

    def __enter__(self) -> "LocalSwarm":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def servers(self) -> list[LocalServer]:
        """The servers that are running, in the order of their blocks."""
        self._drain()
        alive = [server for number, server in self._servers.items() if number not in self._ended]
        return sorted(alive, key=lambda server: (server.start, server.end, server.number))

    @property
    def pids(self) -> list[int]:
        """Processes of this swarm: the preloaded one, every server, every p2pd."""
        return [self._process.pid, *self._pids.values(), *(server.p2pd_pid for server in self._servers.values())]

    @property
    def token(self) -> str:
        """A token that names the running servers' first."""
        servers = self.servers
        if not servers:
            raise SwarmFailure("no server of this swarm is running: start it again.")
        return min(servers, key=lambda server: server.number).token

    def start(self, *, servers: int | None = None, spans: Sequence[tuple[int, int]] | None = None) -> "LocalSwarm":
        """Start `servers` servers with equal shares of the blocks, or one for each span. Raises what they raise."""
        if spans is None:
            spans = even_spans(self.num_blocks(), servers or 1)
        threads = max(1, (os.cpu_count() or 1) // len(spans))
        first = self._launch(spans[0], token=None, threads=threads)
        self._wait_ready([first])
        rest = [self._launch(span, token=self.token, threads=threads) for span in spans[1:]]
        self._wait_ready(rest)
        return self

    def add(self, span: tuple[int, int], *, threads: int = 1, **options: Any) -> LocalServer:
        """One more server, for these blocks."""
        number = self._launch(span, token=self.token, threads=threads, **options)
        self._wait_ready([number])
        return self._servers[number]

    def join(self, token: str, *, threads: int = 1, **options: Any) -> LocalServer:
        """One more server, where a coordinator says which blocks it holds; `servers` tell where it is later on."""
        number = self._launch(None, token=token, threads=threads, **options)
        self._wait_ready([number])
        return self._servers[number]

    def kill(self, server: LocalServer, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to a server's process, not to its p2pd."""
        os.kill(server.pid, signal_number)

    def num_blocks(self) -> int:
        """How many blocks the model has, as its config says."""
        number = self._send({"do": "inspect", "model": self.model, "revision": self._revision})
        return int(self._wait_for("model", number)["num_blocks"])

    def wait_any_end(self) -> LocalServer | None:
        """Block until a server ends by itself; None when the whole swarm is gone."""
        known = set(self._ended)
        while True:
            event = self._next_event(None)
            if event is None:
                return None
            for number in self._ended - known:
                if number in self._servers:
                    return self._servers[number]

    def stop(self) -> None:
        """End all servers: SIGTERM, then SIGKILL for what does not end in time."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                self._reporter.line("the local swarm had ended already")
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its servers die with it
            self._process.wait()
        self._reader.join(_STOP_TIMEOUT_S)
        sweep_stale_folders()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _launch(self, span: tuple[int, int] | None, *, token: str | None, threads: int, **options: Any) -> int:
        config = {
            "model": self.model,
            "revision": self._revision,
            "blocks": None if span is None else list(span),
            "token": token,
            "threads": threads,
        }
        return self._send({"do": "serve", "config": {**config, **self._options, **options}})

    def _send(self, command: dict[str, Any]) -> int:
        number, self._next = self._next, self._next + 1
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps({**command, "number": number}) + "\n").encode())
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise SwarmFailure("the local swarm's process has ended: see its messages above.") from error
        return number

    def _wait_ready(self, numbers: list[int]) -> None:
        for number in numbers:
            while number not in self._servers:
                self._wait_for("ready", number)

    def _wait_for(self, kind: str, number: int) -> dict[str, Any]:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            event = self._next_event(deadline - time.monotonic())
            if event is None:
                raise SwarmFailure("the local swarm's process has ended: see its messages above.")
            if event.get("number") != number:
                continue
            if event["event"] == kind:
                return event
            if event["event"] == "ended":
                raise SwarmFailure(f"a server of the local swarm ended with code {event['code']} before it was ready.")

    def _next_event(self, timeout_s: float | None) -> dict[str, Any] | None:
        try:
            event = self._events.get(timeout=None if timeout_s is None else max(timeout_s, 0.0))
        except queue.Empty:
            raise SwarmFailure(f"a server of the local swarm was not ready within {_START_TIMEOUT_S:.0f} s.") from None
        if event is None:
            self._events.put(None)
            return None
        self._note(event)
        return event

    def _drain(self) -> None:
        while not self._events.empty():
            if self._next_event(0.0) is None:
                return

    def _note(self, event: dict[str, Any]) -> None:
        number = event.get("number", -1)
        match event["event"]:
            case "preloaded":
                self.preload_s = float(event["seconds"])
            case "forked":
                self._forked_at[number] = event["at"]
                self._pids[number] = int(event["pid"])
            case "line":
                self._reporter.line(f"[server {number}] {event['text']}")
            case "ended":
                self._ended.add(number)
                self._pids.pop(number, None)
            case "failed":
                kind = getattr(geopetals.errors, str(event["kind"]), GeoPetalsError)
                raise kind(event["text"])
            case "ready":
                self._servers[number] = self._ready(number, event)

    def _ready(self, number: int, event: dict[str, Any]) -> LocalServer:
        fields = {key: event[key] for key in LocalServer.__dataclass_fields__ if key in event and key != "number"}
        took_s = event["at"] - self._forked_at[number]
        return LocalServer(number=number, ready_s=took_s, **fields)

    def _read_events(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put({**json.loads(line), "at": time.monotonic()})
        self._events.put(None)
