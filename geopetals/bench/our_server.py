"""Block servers as processes of their own, on emulated devices and emulated hosts; stock_server.py has PETALS'."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from geopetals.bench.devices import device_text
from geopetals.errors import SwarmFailure
from geopetals.swarm.emulation import DeviceSpec

_TOKEN = re.compile(r"--join (\S+)")
_STOP_TIMEOUT_S = 15.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class OurServerSpec:
    """`span` None: the server chooses, as many as fit the device's memory.

    `address` is the IPv4 address of its host; `prefix` the words that start a process there.
    """

    span: tuple[int, int] | None = None
    device: DeviceSpec | None = None
    cache_tokens: int | None = None
    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Of `geopetals serve`."""
        words = ["--host", self.address, "--device", "cpu", "--dtype", "float32"]
        if self.span is not None:
            words += ["--blocks", f"{self.span[0]}:{self.span[1]}"]
        if self.cache_tokens is not None:
            words += ["--kv-cache-tokens", str(self.cache_tokens)]
        if self.device is not None:
            words += ["--emulate", device_text(self.device), "--dilation", repr(self.device.dilation)]
        return words


class OurServer:
    """One running server. All that it writes stays in a temporary folder until `stop()`."""

    def __init__(self, model: Path, spec: OurServerSpec, *, swarm: str, token: str | None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="gpo-"))
        self._log = self._folder / "log"
        command = [sys.executable, "-m", "geopetals", "serve", str(model), "--dht-prefix", swarm, *spec.arguments()]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*spec.prefix, *command, *(["--join", token] if token else [])],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self._folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_token(self, timeout_s: float = 120.0) -> str:
        """The token by which to join it; it serves then."""
        deadline = time.monotonic() + timeout_s
        while (found := _TOKEN.search(self._log.read_text(errors="replace"))) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = self._log.read_text(errors="replace")[-3000:]
                raise SwarmFailure(f"a server does not serve after {timeout_s:.0f} s, or ended: {tail}")
            time.sleep(_POLL_S)
        return found[1]

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for what does not end in time."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def our_swarm(model: Path, specs: Sequence[OurServerSpec], *, swarm: str) -> Iterator[str]:
    """All servers serving; yields a token. One after another, where they choose their blocks by what others have."""
    with contextlib.ExitStack() as held:
        servers: list[OurServer] = []
        token: str | None = None
        chooses = any(spec.span is None for spec in specs)
        for spec in specs:
            servers.append(OurServer(model, spec, swarm=swarm, token=token))
            held.callback(servers[-1].stop)
            if token is None:
                token = servers[-1].wait_token()
            elif chooses:
                servers[-1].wait_token()
        for server in servers:
            server.wait_token()
        assert token is not None
        yield token
