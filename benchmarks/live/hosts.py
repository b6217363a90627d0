"""The emulated hosts of a scenario, and the round trips between them as measured on it."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from geopetals.errors import SwarmFailure
from geopetals.problem import Floats
from geopetals.wan import HostSpec, LinkSpec, Wan, WanSpec
from geopetals.wan.sources import from_cluster
from live.translation import Live

COORDINATOR = "coordinator"
_BESIDE_S = 0.0005
_PORT = 7007


def network(live: Live) -> WanSpec:
    """A host for each machine, and the coordinator's, which is as far from the others as the machine beside it."""
    spec = from_cluster(live.cluster)
    beside = live.scenario.coordinator
    links = dict(spec.links)
    for name in spec.names:
        there, back = (beside, name), (name, beside)
        near = LinkSpec(rtt_s=_BESIDE_S)
        links[COORDINATOR, name] = near if name == beside else spec.links[there]
        links[name, COORDINATOR] = near if name == beside else spec.links[back]
    return replace(spec, hosts=(*spec.hosts, HostSpec(name=COORDINATOR)), links=links, dilation=live.scenario.dilation)


class Pings:
    """Measures round trips between all hosts; a process in each answers."""

    def __init__(self, wan: Wan, names: Sequence[str]) -> None:
        self._wan, self._names = wan, list(names)
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def measure(self, *, dilation: float) -> Floats:
        """(H, H): seconds in the order of the names, divided by the dilation. Raises SwarmFailure."""
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        count, at = len(self._names), self._wan.addresses
        rtts = np.zeros((count, count))
        for row, name in enumerate(self._names):
            stdout = self._processes[name].stdout
            assert stdout is not None
            found = json.loads(stdout.readline() or "{}")
            for column, other in enumerate(self._names):
                if row != column:
                    if at[other] not in found:
                        raise SwarmFailure(f"{other} does not answer {name}: the emulated network has lost packets.")
                    rtts[row, column] = found[at[other]] / dilation
        return rtts

    def start(self) -> None:
        for name in self._names:
            others = [self._wan.addresses[other] for other in self._names if other != name]
            command: list[str | Path] = [
                sys.executable,
                "-I",
                "-S",
                Path(__file__).with_name("echo.py"),
                str(_PORT),
                *others,
            ]
            process = self._wan.popen(name, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._processes[name] = process
        for process in self._processes.values():
            assert process.stdout is not None
            process.stdout.readline()

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()


@contextmanager
def hosts(spec: WanSpec) -> Iterator[tuple[Wan, Pings]]:
    """The network, up, and what measures it."""
    with ExitStack() as held:
        wan = held.enter_context(Wan(spec))
        pings = Pings(wan, spec.names)
        held.callback(pings.stop)
        pings.start()
        yield wan, pings
