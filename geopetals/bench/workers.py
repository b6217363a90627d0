"""The client processes of a run, one for each host, and the events they send: see worker_loop.py."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geopetals.bench.worker_loop import boot_id
from geopetals.errors import SwarmFailure, UnsupportedInput

_READY_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 20.0
_LOG_CHARACTERS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """How to start one host's client: its command, what makes its environment from its folder, its first line."""

    host: str
    command: Sequence[str]
    config: Mapping[str, Any]
    environment: Callable[[Path], Mapping[str, str]]


class Worker:
    """One client process, in a process group of its own."""

    def __init__(self, spec: WorkerSpec, folder: Path, events: "queue.Queue[tuple[str, dict[str, Any]]]") -> None:
        self.host = spec.host
        self._events, self._log = events, folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                list(spec.command),
                env=dict(spec.environment(folder)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self.write(spec.config)
        self._reader = threading.Thread(target=self._read, name=f"geopetals-bench-{spec.host}", daemon=True)
        self._reader.start()

    def write(self, message: Mapping[str, Any]) -> None:
        self.write_line(json.dumps(message).encode() + b"\n")

    def write_line(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # its end is an event
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def end(self) -> None:
        """Ask it to stop, then end what is left of its group: PETALS forgets children of its own."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(_STOP_TIMEOUT_S)
        self._process.stdout.close()

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-_LOG_CHARACTERS:]

    def _read(self) -> None:
        assert self._process.stdout is not None
        event: dict[str, Any] = {}
        for line in self._process.stdout:
            event = json.loads(line)
            self._events.put((self.host, event))
        if event.get("event") != "stopped":
            self._events.put((self.host, {"event": "ended"}))


class Workers:
    """All hosts' clients."""

    def __init__(self, workers: Mapping[str, Worker], events: "queue.Queue[tuple[str, dict[str, Any]]]") -> None:
        self._workers, self._events = workers, events

    @property
    def hosts(self) -> list[str]:
        return list(self._workers)

    def __getitem__(self, host: str) -> Worker:
        return self._workers[host]

    def next_event(self, deadline: float) -> tuple[str, dict[str, Any]] | None:
        """(host, event), or None at the deadline of the monotonic clock. Raises SwarmFailure when a client ends."""
        try:
            host, event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        if event["event"] in ("ended", "failed"):
            reason = event.get("message") or self._workers[host].log_tail()
            raise SwarmFailure(f"the client of host {host} has ended: {reason}")
        return host, event

    def gather(self, kind: str, timeout_s: float) -> dict[str, dict[str, Any]]:
        """This event of each host, in the order of the hosts."""
        found: dict[str, dict[str, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(found) < len(self._workers):
            got = self.next_event(deadline)
            if got is None:
                missing = ", ".join(host for host in self._workers if host not in found)
                raise SwarmFailure(f"no {kind} within {timeout_s:.0f} s from the client of host {missing}.")
            host, event = got
            if event["event"] == kind:
                found[host] = event
        return {host: found[host] for host in self._workers}

    def ready(self) -> dict[str, dict[str, Any]]:
        """What the clients know when all have opened the model."""
        events = self.gather("ready", _READY_TIMEOUT_S)
        for host, event in events.items():
            if event["boot"] != boot_id():
                raise UnsupportedInput(
                    f"the client of {host} runs on another machine, with a clock of its own: start it on this one."
                )
        return {host: event["facts"] for host, event in events.items()}

    def stop(self) -> dict[str, dict[str, Any]]:
        """What they know at the end."""
        for worker in self._workers.values():
            worker.write({"do": "stop"})
        return {host: event["facts"] for host, event in self.gather("stopped", _STOP_TIMEOUT_S).items()}


@contextlib.contextmanager
def started(specs: Sequence[WorkerSpec]) -> Iterator[Workers]:
    """The processes, all started; gone when the block is left."""
    events: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    with contextlib.ExitStack() as held:
        # A short path: the name of a Unix socket has at most 107 bytes.
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="gpb-", ignore_cleanup_errors=True)))
        workers: dict[str, Worker] = {}
        endings: list[Worker] = []
        held.callback(_end_all, endings)
        for number, spec in enumerate(specs):
            own = folder / str(number)
            own.mkdir()
            workers[spec.host] = Worker(spec, own, events)
            endings.append(workers[spec.host])
        yield Workers(workers, events)


def _end_all(workers: Sequence[Worker]) -> None:
    threads = [threading.Thread(target=worker.end) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
