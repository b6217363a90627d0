"""One host's client process: takes requests as JSON lines, works on all of them at once, answers each as a JSON line.

    in    {"number": 7, "prompt": [11, 42], "output_tokens": 32}
          {"do": "stop"}: finish, report and end. The end of the input without it: end at once, nobody listens.
    out   {"event": "ready", "facts": {...}, "boot": "..."}
          {"event": "answer", "number": 7, "began": 123.4, "opened": 123.5, "times": [...], "tokens": [...], ...}
          {"event": "stopped", "facts": {...}}

Times are seconds of the machine's monotonic clock, which all processes share, also those in network namespaces; `boot`
says which machine's clock it is. This file needs Python's standard library alone, because stock PETALS' environment
runs it too.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

_COLLECT_EVERY_S = 5.0


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came of one request so far. `opened`: when the attention caches were reserved."""

    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    opened: float | None = None
    chain: list[tuple[str, int, int]] = field(default_factory=list)


class Client(Protocol):
    """A system under test, from its clients' side. Called from many threads at once."""

    def facts(self) -> Mapping[str, Any]:
        """What this client knows of the swarm: versions, servers, round trips."""

    def generate(self, prompt: list[int], output_tokens: int, answer: Answer) -> None:
        """Generate so many tokens and note each in `answer` when it is there."""


class TokenTimes:
    """A Transformers streamer that notes tokens and times; the first call gives the prompt."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self._answer.times.append(time.monotonic())
            self._answer.tokens += value.flatten().tolist()
        self._prompt_seen = True

    def end(self) -> None:
        return None


def serve(open_client: Callable[[Mapping[str, Any]], Client]) -> None:
    """Open the client that the first line describes, then obey until the input ends."""
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)  # whatever a library prints is no answer
        out = _Out(stdout)
        try:
            client = open_client(json.loads(sys.stdin.readline()))
            out.write({"event": "ready", "facts": client.facts(), "boot": boot_id()})
        except Exception as error:  # noqa: BLE001 - the load generator says it
            traceback.print_exc()
            out.write({"event": "failed", "reason": type(error).__name__, "message": str(error)})
            return
        _obey(client, out)


def boot_id() -> str:
    """Which start of which machine this is; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class _Out:
    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def write(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(event) + "\n"
        with self._lock:
            self._stream.write(line)
            self._stream.flush()


def _obey(client: Client, out: _Out) -> None:
    # PETALS' sessions close themselves in __del__, which waits for the event loop: for ever, if the garbage collector
    # runs in that loop's thread. So it runs here alone, and on what is new alone, for both systems.
    gc.collect()
    gc.freeze()
    gc.disable()
    collected = time.monotonic()
    threads: list[threading.Thread] = []
    for line in sys.stdin:
        command = json.loads(line)
        if command.get("do") == "stop":
            break
        thread = threading.Thread(target=_work, args=(client, command, out), daemon=True)
        thread.start()
        threads = [*(other for other in threads if other.is_alive()), thread]
        if time.monotonic() - collected > _COLLECT_EVERY_S:
            gc.collect()
            collected = time.monotonic()
    else:
        _end_group()
    for thread in threads:
        thread.join()
    out.write({"event": "stopped", "facts": client.facts(), "cpu_s": time.process_time()})


def _end_group() -> None:
    """Nobody listens any more. PETALS' client leaves children behind, which are in this process' group."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _work(client: Client, command: dict[str, Any], out: _Out) -> None:
    answer, error = Answer(), None
    began = time.monotonic()
    try:
        client.generate(command["prompt"], command["output_tokens"], answer)
    except Exception as failure:  # noqa: BLE001 - it is the outcome of this request
        traceback.print_exc()
        error = {"reason": type(failure).__name__, "message": str(failure)[:500]}
    ended = time.monotonic()
    event = {"event": "answer", "number": command["number"], "began": began, "ended": ended, "error": error}
    out.write({**event, "times": answer.times, "tokens": answer.tokens, "opened": answer.opened, "chain": answer.chain})
