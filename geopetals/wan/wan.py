"""A network that runs: started and ended, entered and changed."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from geopetals.wan import control, namespaces
from geopetals.wan.changes import Change
from geopetals.wan.errors import WanError, WanFailure
from geopetals.wan.spec import WanSpec
from geopetals.wan.state import LOG, StateDirectory


class Started(NamedTuple):
    """What a network's router says about itself, and its process."""

    state: dict[str, Any]
    daemon: "subprocess.Popen[bytes]"


_ENTER = Path(__file__).with_name("enter.py")
_START_S = 60.0
_END_S = 20.0


class Wan:
    """Emulated hosts in network namespaces of this machine; as a context it is up inside, and ends with this process.

        with Wan(WanSpec.uniform(["a", "b"], rtt_s=0.08)) as wan:
            server = wan.popen("a", ["python", "-m", "http.server"])
            wan.set("a-b", rtt_s=0.2, loss=0.01)
            wan.cut("a")

    Raises WanError for what this machine does not allow, WanFailure if the network's router dies.
    """

    def __init__(self, spec: WanSpec, *, state: Path | None = None) -> None:
        self._spec = spec
        self._temporary = state is None
        self.directory = StateDirectory(state or Path(tempfile.gettempdir()))
        self._started: Started | None = None

    @classmethod
    def attach(cls, state: Path) -> Self:
        """The network that somebody else has started in this directory, and will end. Raises WanFailure if none is."""
        directory = StateDirectory(state)
        try:
            return cls(directory.spec(), state=state)
        except OSError as error:
            raise control.unreachable(directory.path, error) from error

    def __enter__(self) -> Self:
        if self._temporary:
            self.directory = StateDirectory(Path(tempfile.mkdtemp(prefix="geopetals-wan-")))
        try:
            self._started = start(self.directory, self._spec, owner=os.getpid())
        except BaseException:
            self._forget()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            down(self.directory)
            if self._started is not None:
                self._started.daemon.wait()
        finally:
            self._forget()

    @property
    def addresses(self) -> dict[str, str]:
        """Where others see each host."""
        return {name: host["public_address"] for name, host in self._hosts.items()}

    @property
    def own_addresses(self) -> dict[str, str]:
        """What each host's device has: another one behind NAT."""
        return {name: host["address"] for name, host in self._hosts.items()}

    def prefix(self, host: str) -> list[str]:
        """What to put in front of a command so that it runs in a host; its process id stays that of the command."""
        return [sys.executable, "-I", "-S", str(_ENTER), str(self.directory.path), host]

    def popen(self, host: str, command: Sequence[str | Path], **options: Any) -> "subprocess.Popen[Any]":
        """As subprocess.Popen, in the host."""
        return subprocess.Popen([*self.prefix(host), *map(str, command)], **options)

    def run(self, host: str, command: Sequence[str | Path], **options: Any) -> "subprocess.CompletedProcess[Any]":
        """As subprocess.run, in the host."""
        return subprocess.run([*self.prefix(host), *map(str, command)], **options)

    def set(
        self,
        target: str,
        *,
        rtt_s: float | None = None,
        jitter_s: float | None = None,
        loss: float | None = None,
        bandwidth_bit_per_s: float | None = None,
        up_bit_per_s: float | None = None,
        down_bit_per_s: float | None = None,
    ) -> None:
        """Change links of `A-B`, `A>B`, `A` or `all`; a rate of 0 takes a limit away."""
        change = Change(
            rtt_s=rtt_s,
            jitter_s=jitter_s,
            loss=loss,
            bandwidth_bit_per_s=bandwidth_bit_per_s,
            up_bit_per_s=up_bit_per_s,
            down_bit_per_s=down_bit_per_s,
        )
        set_links(self.directory, target, change)

    def cut(self, target: str) -> None:
        """Nothing passes `A`, `A-B` or `A>B` any more; what is on its way is lost."""
        self._request(do="cut", target=target)

    def heal(self, target: str | None = None) -> None:
        """Undo that very cut, or all of them."""
        self._request(do="heal", target=target)

    def links(self, target: str) -> list[dict[str, Any]]:
        """Each direction as it is now."""
        found: list[dict[str, Any]] = self._request(do="links", target=target)
        return found

    def status(self) -> dict[str, Any]:
        """As `geopetals wan status --json` prints it."""
        found: dict[str, Any] = self._request(do="status")
        return found

    def lateness(self) -> dict[str, Any]:
        """Of packets handed on since the last reset: packets, mean_s, p50_s, p90_s, p99_s, max_s, histogram."""
        found: dict[str, Any] = self.status()["run"]["lateness"]
        return found

    def reset(self) -> dict[str, Any]:
        """Begin a run: all counts start at 0. Returns those of the run before, as in `status()["run"]`."""
        found: dict[str, Any] = self._request(do="reset")
        return found

    @property
    def _hosts(self) -> dict[str, Any]:
        hosts: dict[str, Any] = (self.status() if self._started is None else self._started.state)["hosts"]
        return hosts

    def _request(self, **message: Any) -> Any:
        return control.request(self.directory.path, message)

    def _forget(self) -> None:
        if self._temporary:
            shutil.rmtree(self.directory.path, ignore_errors=True)


def set_links(directory: StateDirectory, target: str, change: Change) -> None:
    """`Wan.set` for a network that somebody else has started."""
    control.request(directory.path, {"do": "change", "target": target, "change": change.to_value()})


def start(directory: StateDirectory, spec: WanSpec, *, owner: int | None = None) -> Started:
    """Start a network that stays until it is taken down, or until `owner` ends; returns when it is ready.

    What a dead run has left in the directory is cleaned up first. Raises WanError if a network runs there.
    """
    namespaces.check_supported()
    directory.make()
    lock = directory.lock()
    if lock is None:
        raise WanError(f"a network runs in {directory.path} already: take it down first, or give this one a --name.")
    try:
        directory.clean()
        directory.write_spec(spec)
        try:
            return _start_daemon(directory, lock, owner)
        except BaseException:
            directory.clean()
            directory.remove()
            raise
    finally:
        os.close(lock)


def down(directory: StateDirectory) -> bool:
    """End every process in the network's hosts, then the network, however dead it is; tell whether there was one."""
    if not directory.exists():
        return False
    with contextlib.suppress(WanFailure):
        control.request(directory.path, {"do": "down"})
    lock = directory.lock_when_free(_END_S)
    try:
        directory.clean()
        directory.remove()
    finally:
        os.close(lock)
    return True


def _start_daemon(directory: StateDirectory, lock: int, owner: int | None) -> Started:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "geopetals.wan.daemon", str(directory.path), str(lock), str(writer)]
    with _closing(reader), (directory.path / LOG).open("wb") as log:
        with _closing(writer):
            daemon = subprocess.Popen(
                command if owner is None else [*command, str(owner)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock, writer),
                start_new_session=True,
            )
        try:
            return Started(_state(reader, directory), daemon)
        except BaseException:
            daemon.kill()
            daemon.wait()
            raise


def _state(reader: int, directory: StateDirectory) -> dict[str, Any]:
    """What the daemon says about itself."""
    data = b""
    while select.select([reader], (), (), _START_S)[0]:
        part = os.read(reader, 1 << 16)
        data += part
        if not part:
            break
    else:
        raise WanFailure(f"the network was not ready within {_START_S:.0f} s: the machine is too busy, try again.")
    if not data:
        said = (directory.path / LOG).read_text(errors="replace").strip().splitlines()
        raise WanFailure(f"the network's router died at its start: {said[-1] if said else 'it said nothing'}.")
    answer: dict[str, Any] = json.loads(data)
    if "error" in answer:
        raise WanError(answer["error"])
    state: dict[str, Any] = answer["ok"]
    return state


@contextlib.contextmanager
def _closing(file: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(file)
