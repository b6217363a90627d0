"""The preloaded process of a local swarm: imports once, then forks one block server after another in about a second.

Commands come as JSON lines on stdin, events go as JSON lines to stdout; the end of stdin ends every server. Nothing
here may start a thread or touch CUDA before the fork.
"""

import asyncio
import gc
import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from geopetals.errors import GeoPetalsError
from geopetals.swarm.orphan_guard import die_with_parent
from geopetals.swarm.spinning import spin_briefly

STOP_TIMEOUT_S = 10.0


def main() -> int:
    began = time.monotonic()
    spin_briefly()
    _preload()
    _emit({"event": "preloaded", "seconds": time.monotonic() - began})
    return _Zygote().run()


def _preload() -> None:
    """What is imported stays: no garbage collection looks at it again, nor copies its pages into every fork."""
    import geopetals.client.runtime
    import geopetals.swarm.server  # noqa: F401

    gc.collect()
    gc.freeze()


def _emit(event: dict[str, Any]) -> None:
    """One write per line, so that lines of several processes do not mix (they are shorter than PIPE_BUF)."""
    os.write(1, (json.dumps(event) + "\n").encode())


class _Zygote:
    def __init__(self) -> None:
        self._children: dict[int, int] = {}
        self._stopping = False
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def run(self) -> int:
        """Obey until stdin ends or SIGTERM comes; then end the children."""
        os.set_blocking(0, False)
        buffer = b""
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if self._wake_read in ready:
                    signals = os.read(self._wake_read, 4096)
                    self._reap()
                    if signal.SIGTERM in signals or signal.SIGINT in signals:
                        break
                if 0 in ready:
                    data = os.read(0, 65536)
                    if not data:
                        break
                    *lines, buffer = (buffer + data).split(b"\n")
                    for line in lines:
                        self._obey(json.loads(line))
        self._end_children()
        return 0

    def _obey(self, command: dict[str, Any]) -> None:
        work = _inspect if command["do"] == "inspect" else _serve
        number = int(command["number"])
        pid = self._fork(lambda: work(number, command))
        self._children[pid] = number
        _emit({"event": "forked", "number": number, "pid": pid})

    def _fork(self, work: Callable[[], None]) -> int:
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            if sys.platform == "linux":
                die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - a fork must never return into its parent's code
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)  # the preloaded process' exit handlers are not ours to run

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            number = self._children.pop(pid, None)
            _emit({"event": "ended", "number": number, "pid": pid, "code": os.waitstatus_to_exitcode(status)})

    def _end_children(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            while self._children and (left_s := deadline - time.monotonic()) > 0:
                if selector.select(left_s):
                    os.read(self._wake_read, 4096)
                self._reap()
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class _Events:
    """A Reporter whose lines become events of one server."""

    def __init__(self, number: int) -> None:
        self._number = number

    def line(self, text: str) -> None:
        _emit({"event": "line", "number": self._number, "text": text})

    def task(self, text: str, *, total: int, unit: str = "bytes") -> Any:
        from geopetals.progress import Silent

        self.line(text)
        return Silent().task(text, total=total, unit=unit)


def _inspect(number: int, command: dict[str, Any]) -> None:
    from geopetals.swarm.checkpoint import Checkpoint

    try:
        checkpoint = Checkpoint.open(command["model"], revision=command["revision"], reporter=_Events(number))
        _emit({"event": "model", "number": number, "num_blocks": checkpoint.num_blocks})
    except GeoPetalsError as error:
        _emit({"event": "failed", "number": number, "text": str(error), "kind": type(error).__name__})


def _serve(number: int, command: dict[str, Any]) -> None:
    from geopetals.client.runtime import new_event_loop
    from geopetals.join_token import JoinToken
    from geopetals.swarm.emulation import DeviceSpec
    from geopetals.swarm.server import BlockServer
    from geopetals.swarm.server_config import ServerConfig

    fields = dict(command["config"])
    fields["blocks"] = tuple(fields["blocks"]) if fields.get("blocks") else None
    fields["token"] = JoinToken.decode(fields["token"]) if fields.get("token") else None
    fields["emulate"] = DeviceSpec.from_dict(fields["emulate"]) if fields.get("emulate") else None
    server = BlockServer(
        ServerConfig(**fields),
        _Events(number),
        lambda ready: _emit({"event": "ready", "number": number, "pid": os.getpid(), **asdict(ready)}),
    )

    async def serve() -> None:
        stop = asyncio.Event()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
        await server.run(stop)

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(serve())
    except GeoPetalsError as error:
        _emit({"event": "failed", "number": number, "text": str(error), "kind": type(error).__name__})


if __name__ == "__main__":
    sys.exit(main())
