"""A swarm with a coordinator on hosts of an emulated network (or on this one), its clients, and what it says."""

import contextlib
import http.client
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from geopetals.wan import Wan, WanSpec
from tests.live.commands import wait_for
from tests.live.forked import Forked, Forks
from tests.live.wan_programs import why_not

READY_S = 180.0
"""Many processes share few cores."""
BLOCK_BYTES = 148_000
"""What a block of the tiny Llama takes, and some cache."""
_HTTP_PORT = 8470


def forward(arguments: list[str]) -> int:
    """SOCKET: carry what comes to a unix socket, which all network namespaces see, to the coordinator's HTTP here."""
    import asyncio

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward = await asyncio.open_connection("127.0.0.1", _HTTP_PORT)
        except OSError:
            writer.close()
            return
        await asyncio.gather(carry(reader, onward[1]), carry(onward[0], writer))

    async def serve() -> None:
        server = await asyncio.start_unix_server(accept, arguments[0])
        print("forwarding", flush=True)
        await server.serve_forever()

    asyncio.run(serve())
    return 0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._socket_path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._socket_path)


class SessionsClient:
    """A client process; `start` a session, and `wait` for what it comes to."""

    def __init__(self, process: Forked) -> None:
        self.process = process
        self._numbers = itertools.count()

    def start(self, prompt: list[int], tokens: int, *, pause_at: int | None = None) -> str:
        name = str(next(self._numbers))
        told: dict[str, Any] = {"id": name, "prompt": prompt, "tokens": tokens}
        self.process.tell(json.dumps(told if pause_at is None else told | {"pause_at": pause_at}))
        return name

    def go_on(self, name: str) -> None:
        self.process.tell(json.dumps({"go": name}))

    def said(self, name: str | None = None) -> list[dict[str, Any]]:
        """All that it has told; of one session if it is named."""
        said = [json.loads(line) for line in self.process.out.splitlines() if line.endswith("}")]
        return said if name is None else [each for each in said if each.get("id") == name]

    def wait(self, name: str, event: str, *, timeout_s: float = READY_S) -> dict[str, Any]:
        """Fails at once if the session has failed."""

        def look() -> dict[str, Any] | None:
            said = {each["event"]: each for each in self.said(name)}
            assert event in said or "failed" not in said, f"{said['failed']}: {self.process.printed()}"
            assert event in said or self.process.is_running, self.process.printed()
            return said.get(event)

        return wait_for(look, timeout_s=timeout_s, what=lambda: f"{event} of {name}: {self.process.printed()}")


class EmulatedSwarm:
    """Each program on the host of its name; without a network, all on this one."""

    def __init__(self, forks: Forks, model: Path, folder: Path, wan: Wan | None, settings: dict[str, Any]) -> None:
        self.forks, self.model, self._folder, self._wan = forks, model, folder, wan
        self.state = folder / "state"
        self._settings = folder / "settings.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._settings.write_text(json.dumps({"settle_s": 0.2, "settle_most_s": 2.0, "drain_s": 5.0} | settings))
        self.coordinator: Forked | None = None
        self.programs: list[Forked] = []
        self.servers: dict[str, Forked] = {}
        self.tokens: dict[str, str] = {}
        self._patches: dict[str, Any] = {}
        self._url = ""

    def start_coordinator(self, patches: dict[str, Any] | None = None) -> Forked:
        """Or start it again, from the state it left."""
        http_at = "127.0.0.1:0" if self._wan is None else f"127.0.0.1:{_HTTP_PORT}"
        options: list[str | Path] = [
            "--model",
            self.model,
            "--state",
            self.state,
            "--settings",
            self._settings,
            "--http",
            http_at,
        ]
        if self._wan is not None:
            options += ["--host", self._wan.addresses["coordinator"]]
        self.coordinator = started = self.run("coordinator", "coordinator", *options, patches=patches)
        self._url = started.wait_line(r"status at http://(\S+)/status", timeout_s=READY_S)[1]
        for role, verb in (("server", "serve"), ("client", "generate")):
            self.tokens[role] = started.wait_line(rf"geopetals {verb} --join (gp2\w+)")[1]
        if self._wan is not None and not (self._folder / "http").exists():
            path = self._folder / "http"
            forward = self.forks.start(path, call=f"{__name__}:forward", host="coordinator", wan=self._wan)
            self.programs.append(forward)
            forward.wait_line("forwarding", timeout_s=READY_S)
        return started

    def kill_coordinator(self) -> None:
        assert self.coordinator is not None
        self.coordinator.kill()

    def restart_coordinator(self, **settings: Any) -> None:
        """Killed, and started again with other settings."""
        self.kill_coordinator()
        self._settings.write_text(json.dumps(json.loads(self._settings.read_text()) | settings))
        self.start_coordinator()

    def serve(self, host: str, *options: str, patches: dict[str, Any] | None = None) -> Forked:
        """A server that joins with the token alone."""
        words = ["--join", self.tokens["server"], "--name", host, *options]
        self.servers[host] = self.run(host, "serve", *words, patches=patches)
        return self.servers[host]

    def client(self, host: str, *, patches: dict[str, Any] | None = None, **options: Any) -> SessionsClient:
        words = (self.model, self.tokens["client"], json.dumps(options))
        process = self.forks.start(
            *words, call="tests.live.many_sessions:main", host=host, wan=self._wan, patches=patches
        )
        self.programs.append(process)
        process.wait_line("connected", timeout_s=READY_S)
        return SessionsClient(process)

    def run(self, host: str, *words: str | Path, patches: dict[str, Any] | None = None) -> Forked:
        """`geopetals WORDS`."""
        process = self.forks.start("--log-level", "debug", *words, host=host, wan=self._wan, patches=patches)
        self.programs.append(process)
        return process

    def get(self, page: str) -> Any:
        """What the coordinator's HTTP answers."""
        host, _, port = self._url.partition(":")
        at_hand = self._wan is None
        connection = http.client.HTTPConnection(host, int(port), timeout=30) if at_hand else self._connection()
        with contextlib.closing(connection):
            try:
                connection.request("GET", page)
                return json.load(connection.getresponse())
            except (OSError, http.client.HTTPException) as error:
                said = self.coordinator and self.coordinator.printed()
                raise AssertionError(f"{error!r} for {page} of {said}") from error

    def _connection(self) -> http.client.HTTPConnection:
        return _UnixConnection(self._folder / "http")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/status")
        return found

    def wait_status(self, condition: Callable[[dict[str, Any]], Any], what: str, *, timeout_s: float = READY_S) -> Any:
        """The first true value."""
        last: list[dict[str, Any]] = []

        def look() -> Any:
            last[:] = [self.status()]
            return condition(last[0])

        return wait_for(look, timeout_s=timeout_s, what=lambda: f"{what}: {json.dumps(last)[:4000]}{self.printed()}")

    def printed(self) -> str:
        return "".join(program.printed()[-3000:] for program in self.programs)

    def stop(self) -> None:
        for program in reversed(self.programs):
            program.kill()


class Watch:
    """Looks all the time whether each block has a server, from the moment on that all have one."""

    def __init__(self, swarm: EmulatedSwarm) -> None:
        self._swarm, self._ended = swarm, threading.Event()
        self.gaps: list[list[int]] = []
        self.looks = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(60)

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            replicas = self._swarm.status()["replicas"]
            if self.looks and 0 in replicas:
                self.gaps.append(replicas)
            self.looks += 0 not in replicas


def by_name(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Its servers."""
    return {server["name"]: server for server in status["servers"]}


def is_settled(status: dict[str, Any]) -> bool:
    """No plan is due or being carried out."""
    servers = status["servers"]
    return status["plan_due"] is None and all(
        server["state"] in ("ready", "idle", "gone") and server["assigned"] == server["span"] for server in servers
    )


@contextlib.contextmanager
def network_if_possible(hosts: Sequence[str], *, rtt_s: float = 0.02) -> Iterator[Wan | None]:
    """An emulated one where this machine lets us make one; else none, and all programs run on this host."""
    if why_not():
        yield None
        return
    with Wan(WanSpec.uniform(hosts, rtt_s=rtt_s)) as wan:
        yield wan


@contextlib.contextmanager
def emulated_swarm(
    forks: Forks, model: Path, folder: Path, wan: Wan | None = None, **settings: Any
) -> Iterator[EmulatedSwarm]:
    """With a coordinator that runs; every process is gone when the context is left."""
    swarm = EmulatedSwarm(forks, model, folder, wan, settings)
    try:
        swarm.start_coordinator()
        yield swarm
    finally:
        swarm.stop()
