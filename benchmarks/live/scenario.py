"""A live scenario as people write it down: a cluster, what sessions look like, loads, join orders, what happens."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from geopetals.cluster import Cluster, ClusterError
from geopetals.cluster.kinds import mapping
from geopetals.cluster_io import files_in, load_cluster, read_document
from geopetals.errors import UnsupportedInput
from geopetals.simulation import Happening

FOLDER = Path(__file__).parents[2] / "examples" / "scenarios" / "live"
LOADS = ("one", "half", "over")
_KEYS = {
    "name", "cluster", "topology", "prompt_tokens", "output_tokens", "sessions", "orders", "seed", "dilation",
    "coordinator", "events", "targets", "merge",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveScenario:
    """`cluster` is the world that is emulated. Sessions have `prompt_tokens` and `output_tokens` that stand for those
    of the cluster's workload. `sessions`: how many each load has. `targets`: largest ratio to stock, by load.
    """

    name: str
    cluster: Cluster
    prompt_tokens: int
    output_tokens: int
    sessions: Mapping[str, int]
    orders: int = 10
    seed: int = 1
    dilation: float = 1.0
    merge: int = 1
    """So many blocks of the cluster's model are one here."""
    coordinator: str = ""
    """The machine beside which the coordinator stands."""
    events: tuple[Happening, ...] = ()
    targets: Mapping[str, float] = field(default_factory=dict)

    @property
    def session_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    @property
    def server_names(self) -> list[str]:
        return [str(server.id) for server in self.cluster.servers]

    @property
    def client_names(self) -> list[str]:
        return [str(client.id) for client in self.cluster.clients]

    def join_orders(self) -> list[list[str]]:
        """In which servers join; the first `n` are the same however many are asked for."""
        names = np.array(self.server_names)
        return [
            [str(name) for name in np.random.default_rng([self.seed, 1, number]).permutation(names)]
            for number in range(self.orders)
        ]

    def quick(self) -> "LiveScenario":
        """One order, few sessions: to see whether all works."""
        return replace(self, orders=1, sessions={load: min(count, 4) for load, count in self.sessions.items()})


def load(name: str | Path, *, topologies: Path | None = None) -> LiveScenario:
    """By its name, or from a YAML file. `topologies`: the folder with .graph files of networks; None: topohub.

    Raises UnsupportedInput.
    """
    path = Path(name) if str(name).endswith((".yaml", ".json")) else FOLDER / f"{name}.yaml"
    document, folder = read_document(path)
    given: dict[str, Any] = dict(mapping(document, "live scenario"))
    if unknown := sorted(set(given) - _KEYS):
        raise UnsupportedInput(f"{path}: {unknown[0]!r} is no key of a live scenario: use {', '.join(sorted(_KEYS))}.")
    cluster = _cluster(given.pop("cluster", None), given.pop("topology", None), folder, topologies)
    events = tuple(Happening.from_value(each, files_in(folder)) for each in given.pop("events", ()))
    try:
        scenario = LiveScenario(**{"name": path.stem, **given}, cluster=cluster, events=events)
    except TypeError as error:
        raise UnsupportedInput(f"{path}: {error}.") from error
    _check(scenario)
    return replace(scenario, coordinator=scenario.coordinator or scenario.server_names[0])


def _cluster(value: Any, topology: Any, folder: Path, topologies: Path | None) -> Cluster:
    if isinstance(value, str):
        return load_cluster(files_in(folder).absolute(value))
    given = dict(mapping(value, "cluster"))
    if topology is not None:
        source = dict(mapping(topology, "topology"))
        file, name = str(source.pop("file")), str(source.pop("name"))
        where = {"name": name} if topologies is None else {"file": str(topologies.absolute() / file)}
        given["network"] = {"topology": where | source}
    return Cluster.from_value(given, files_in(folder))


def _check(scenario: LiveScenario) -> None:
    machines = {*scenario.server_names, *scenario.client_names}
    if set(scenario.sessions) - set(LOADS) or not scenario.sessions:
        raise UnsupportedInput(f"sessions is for {', '.join(LOADS)}: give numbers for some of them.")
    if scenario.coordinator and scenario.coordinator not in machines:
        raise UnsupportedInput(f"coordinator: {scenario.coordinator!r} is no machine of the cluster.")
    if set(scenario.server_names) & set(scenario.client_names):
        raise ClusterError(("clients",), "a client is called like a server: give it another name.")
    if scenario.merge < 1 or scenario.cluster.model.num_blocks % scenario.merge:
        raise UnsupportedInput(f"merge: {scenario.merge} does not divide {scenario.cluster.model.num_blocks} blocks.")
    for event in scenario.events:
        if event.server not in scenario.server_names:
            raise UnsupportedInput(f"events: there is no server {event.server!r}.")
