"""What a swarm under test is, and where it is put up."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from geopetals.bench.devices import device_text
from geopetals.bench.systems import SystemUnderTest
from geopetals.bench.workers import WorkerSpec
from geopetals.swarm.emulation import DeviceSpec
from geopetals.wan import Wan
from live.placements import Spans
from live.translation import Live
from tests.live.forked import Forks

SWARM = "tiny"
READY_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Where swarms are put up: the network, who starts processes, and the checkpoint."""

    live: Live
    wan: Wan
    forks: Forks
    model: Path
    folder: Path
    profiled: set[DeviceSpec] = field(default_factory=set)
    """Devices whose profile is known: servers keep it, and those to come find it."""

    def device(self, name: str) -> DeviceSpec:
        return self.live.devices()[name]


class Swarm(Protocol):
    """Servers that serve, as a run needs them."""

    @property
    def under_test(self) -> SystemUnderTest: ...

    def worker(self, host: str) -> WorkerSpec:
        """The client of a host."""
        ...

    def prepare(self) -> None:
        """Called when clients are there and warm, before a run."""
        ...

    def spans(self) -> Spans:
        """What servers hold now."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What the servers believe of themselves, to be written down."""
        ...

    def kill(self, name: str) -> None:
        """As a machine that fails."""
        ...

    def join(self, name: str) -> None:
        """Start that server; returns at once."""
        ...

    def stop(self) -> None:
        """Every process is gone then."""
        ...


def emulation(device: DeviceSpec) -> list[str]:
    """Of `geopetals serve`."""
    curve = ["--emulate", device_text(device), "--dilation", repr(device.dilation)]
    return ["--device", "cpu", "--dtype", "float32", *curve]
