"""A swarm with a coordinator as people run it: `geopetals coordinator`, and servers that join with its token alone."""

import contextlib
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.live.commands import Command, wait_for

READY_S = 120.0
"""Several processes may share few cores."""
# A server of a coordinated swarm whose profile is cheap to measure, and whose memory is what the test says.
QUICK = {"OMP_NUM_THREADS": "1"}


class CoordinatedSwarm:
    """Commands, each a process of its own. All their files are under `folder`."""

    def __init__(self, model: Path, folder: Path, *, settings: dict[str, Any] | None = None) -> None:
        self.model, self.folder = model, folder
        self.cache = folder / "cache"
        self.commands: list[Command] = []
        self._settings = folder / "settings.json"
        folder.mkdir(parents=True, exist_ok=True)
        quick = {"settle_s": 0.2, "settle_most_s": 2.0, "drain_s": 5.0}
        self._settings.write_text(json.dumps(quick | (settings or {})))
        self.coordinator: Command | None = None
        self.tokens: dict[str, str] = {}
        self.url = ""

    def start_coordinator(self, *options: str, prefix: tuple[str, ...] = ()) -> Command:
        """Or start it again, from the state it left."""
        command = self.run(
            "coordinator", "--model", self.model, "--state", self.folder / "state", "--settings", self._settings,
            "--http", "127.0.0.1:0", *options,
        )  # fmt: skip
        self.coordinator = command
        for role, verb in (("server", "serve"), ("client", "generate")):
            self.tokens[role] = command.wait_line(rf"geopetals {verb} --join (gp2\w+)", timeout_s=READY_S)[1]
        self.url = command.wait_line(r"(http://127\.0\.0\.1:\d+)", timeout_s=READY_S)[1]
        return command

    def add_server(self, *options: str, wait: bool = False) -> Command:
        """A server that joins with the token alone; `wait` until it serves blocks."""
        command = self.run("serve", "--join", self.tokens["server"], *options)
        if wait:
            command.wait_line(r"^serving blocks", timeout_s=READY_S)
        return command

    def run(self, *arguments: str | Path) -> Command:
        command = Command(*arguments, env={**QUICK, "GEOPETALS_CACHE": str(self.cache)})
        self.commands.append(command)
        return command

    def status(self) -> dict[str, Any]:
        """What the coordinator says of the swarm."""
        with contextlib.closing(urllib.request.urlopen(f"{self.url}/status", timeout=10)) as response:
            found: dict[str, Any] = json.load(response)
            return found

    def wait_status(self, condition: Callable[[dict[str, Any]], Any], what: str, *, timeout_s: float = READY_S) -> Any:
        return wait_for(lambda: condition(self.status()), timeout_s=timeout_s, what=what)

    def destroy(self) -> None:
        for command in reversed(self.commands):
            command.destroy()


@contextlib.contextmanager
def coordinated(model: Path, folder: Path, **options: Any) -> Iterator[CoordinatedSwarm]:
    """With a coordinator that runs; every process is gone when the context is left."""
    swarm = CoordinatedSwarm(model, folder, **options)
    try:
        swarm.start_coordinator()
        yield swarm
    finally:
        swarm.destroy()
