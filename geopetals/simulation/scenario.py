"""A scenario: what happens to a cluster, and which policies are to be compared, as people write it down."""

from dataclasses import dataclass
from typing import Annotated, Any, Self

from geopetals.cluster import Cluster
from geopetals.cluster.errors import ClusterError, at, shown_value
from geopetals.cluster.kinds import Amount, Choice, Files, Flag, Kind, Name, Schema, Whole
from geopetals.cluster.quantities import DURATION, RATE
from geopetals.cluster.records import Entry, Many, Nested, Record
from geopetals.simulation.lengths import Lengths
from geopetals.simulation.trace import Trace, TraceFile

POLICIES = ("petals", "petals+order", "petals+number", "petals+routing", "paper", "geopetals")
MODES = ("physical", "paper")
BATCHING = ("own", "all", "none")

_TIME = Amount(DURATION, most=1e7)
_SESSIONS = 10_000_000


class _Cluster(Nested):
    """A cluster in the scenario itself, or, already read, from the file that the scenario names."""

    def __init__(self) -> None:
        super().__init__(Cluster)

    def read(self, value: object, files: Files) -> Record:
        return value if isinstance(value, Cluster) else super().read(value, files)

    def schema(self) -> Schema:
        return {"oneOf": [{"type": "string", "description": "path of a cluster file"}, super().schema()]}


class _Policies(Kind):
    """A list of policies' names."""

    def read(self, value: object, files: Files) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def check(self, value: Any) -> None:
        if not isinstance(value, tuple) or not value:
            raise ClusterError((), f"{shown_value(value)} is no list of policies: give at least one.")
        for index, name in enumerate(value):
            with at(index):
                Choice(*POLICIES).check(name)
        if len(set(value)) < len(value):
            raise ClusterError((), "a policy stands there twice: keep one of them.")

    def write(self, value: tuple[str, ...]) -> list[str]:
        return list(value)

    def schema(self) -> Schema:
        return {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"enum": list(POLICIES)}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals(Record):
    """`poisson`, `constant`, or a mapping. A trace's times are stretched to the rate, if one is given."""

    WHAT = "arrivals"

    kind: Annotated[str, Entry("kind", Choice("poisson", "constant", "trace"), "how sessions come")] = "poisson"
    rate_per_s: Annotated[
        float | None,
        Entry("rate", Amount(RATE, positive=True, most=1e6), "sessions of all clients; none: as in the cluster"),
    ] = None

    @classmethod
    def from_value(cls, value: object, files: Files) -> Self:
        return cls(kind=value) if isinstance(value, str) else super(Arrivals, cls).from_value(value, files)

    @classmethod
    def schema(cls) -> Schema:
        return {"oneOf": [{"enum": ["poisson", "constant", "trace"]}, super(Arrivals, cls).schema()]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Record):
    """Sessions that come. Lengths that are not given are those of the cluster's workload.

    Either `sessions` come and all are served to their end, or they come for the `duration`, at whose end the clock
    stops with some in progress.
    """

    WHAT = "workload"

    arrivals: Annotated[Arrivals, Entry("arrivals", Nested(Arrivals), "when sessions come")] = Arrivals()
    prompt: Annotated[Lengths | None, Entry("prompt_tokens", Nested(Lengths), "tokens of prompts")] = None
    output: Annotated[Lengths | None, Entry("output_tokens", Nested(Lengths), "tokens of answers")] = None
    trace: Annotated[Trace | None, Entry("trace", TraceFile(), "requests to take times or lengths from")] = None
    sessions: Annotated[int | None, Entry("sessions", Whole(most=_SESSIONS), "how many sessions come")] = None
    duration_s: Annotated[float | None, Entry("duration", _TIME, "how long sessions come")] = None
    warm_up: Annotated[
        int | None,
        Entry("warm_up", Whole(least=0, most=_SESSIONS), "first sessions that are not measured; none: a tenth"),
    ] = None

    def _check(self) -> None:
        if (self.sessions is None) == (self.duration_s is None):
            raise ClusterError((), "how long the simulation goes on is open: give sessions, or duration, not both.")
        if self.duration_s == 0:
            raise ClusterError(("duration",), "nobody comes in no time: give more than 0 s.")
        wanted = [key for key in ("arrivals", "prompt_tokens", "output_tokens") if self._kind(key) == "trace"]
        if wanted and self.trace is None:
            raise ClusterError((wanted[0],), "the trace is missing: give trace, the path of a CSV file.")
        if self.trace is not None and not wanted:
            raise ClusterError(("trace",), "nothing is taken from it: write `arrivals: trace`, or leave it out.")
        if self.arrivals.kind == "trace" and self.trace is not None and (self.sessions or 0) > len(self.trace):
            raise ClusterError(("sessions",), f"the trace has {len(self.trace)} requests: write that or less.")

    def _kind(self, key: str) -> str | None:
        each = {"arrivals": self.arrivals, "prompt_tokens": self.prompt, "output_tokens": self.output}[key]
        return None if each is None else each.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening(Record):
    """A server that goes or comes. One whose first happening is `up` is absent before."""

    WHAT = "event"

    at_s: Annotated[float, Entry("at", _TIME, "when")]
    down: Annotated[str | None, Entry("down", Name(), "the server that fails")] = None
    up: Annotated[str | None, Entry("up", Name(), "the server that joins, or is back with its blocks")] = None

    def _check(self) -> None:
        if (self.down is None) == (self.up is None):
            raise ClusterError((), "what happens is open: give either down or up, with the name of a server.")

    @property
    def server(self) -> str:
        return self.down or self.up or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants(Record):
    """What the paper's figures add to every request; all 0 unless given."""

    WHAT = "constants"

    initial_s: Annotated[float, Entry("initial_delay", _TIME, "any policy")] = 0.0
    petals_s: Annotated[float, Entry("allocation_petals", _TIME, "petals and its variants; the paper: 250 s")] = 0.0
    planned_s: Annotated[float, Entry("allocation_planned", _TIME, "paper and geopetals; the paper: 60 s")] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario(Record):
    """What is simulated. `cluster` may be left out in code, where the swarm is passed beside the scenario."""

    WHAT = "scenario"

    name: Annotated[str | None, Entry("name", Name(), "what the scenario is called")] = None
    cluster: Annotated[Cluster | None, Entry("cluster", _Cluster(), "a cluster, or the path of one")] = None
    load: Annotated[Load, Entry("workload", Nested(Load), "the sessions that come")]
    events: Annotated[tuple[Happening, ...] | None, Entry("events", Many(Happening), "servers that fail and join")] = (
        None
    )
    policies: Annotated[tuple[str, ...], Entry("policies", _Policies(), "whom to compare")] = (
        "petals",
        "paper",
        "geopetals",
    )
    seeds: Annotated[int, Entry("seeds", Whole(most=10_000), "how often, with other random numbers")] = 1
    mode: Annotated[str, Entry("mode", Choice(*MODES), "paper: with the accounting of the paper's simulator")] = (
        "physical"
    )
    contention: Annotated[
        bool | None,
        Entry("contention", Flag(), "servers slow down with their sessions; none: in physical mode, if that is known"),
    ] = None
    batching: Annotated[
        str,
        Entry("batching", Choice(*BATCHING), "whose servers compute waiting sessions in one step; own: geopetals'"),
    ] = "own"
    max_wait_s: Annotated[
        float | None, Entry("max_wait", _TIME, "sessions that would wait longer are refused; none: all wait")
    ] = None
    constants: Annotated[Constants, Entry("constants", Nested(Constants), "delays of the paper's figures")] = (
        Constants()
    )

    def _check(self) -> None:
        if self.mode == "paper" and self.contention:
            raise ClusterError(
                ("contention",), "the paper's simulator has none: leave it out, or choose mode: physical."
            )
        state: dict[str, str] = {}
        for index, event in enumerate(sorted(self.events or (), key=lambda each: each.at_s)):
            kind = "down" if event.down else "up"
            if state.get(event.server) == kind:
                raise ClusterError(
                    ("events", index, kind), f"{event.server} is {kind} already, by the times given: leave one out."
                )
            state[event.server] = kind
        if self.cluster is not None:
            self._check_names(self.cluster)

    def _check_names(self, cluster: Cluster) -> None:
        known = {str(server.id) for server in cluster.servers}
        for index, event in enumerate(self.events or ()):
            if event.server not in known:
                shown = ", ".join(sorted(known)[:12])
                key = "down" if event.down else "up"
                raise ClusterError(("events", index, key), f"there is no server {event.server!r}: use one of {shown}.")
