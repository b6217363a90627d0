"""A cluster: the model, who serves it, who asks, how far they are from each other, and what a session looks like."""

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

from geopetals.cluster.errors import Called, ClusterError
from geopetals.cluster.kinds import Amount, Name, Whole
from geopetals.cluster.machines import ClientSpec, ServerSpec
from geopetals.cluster.model_spec import ModelSpec
from geopetals.cluster.network import Network
from geopetals.cluster.quantities import RATE
from geopetals.cluster.records import Entry, Many, Nested, Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload(Record):
    """Sessions: their length, and how many there are."""

    WHAT = "workload"

    prompt_tokens: Annotated[int, Entry("prompt_tokens", Whole(), "tokens of a prompt")]
    output_tokens: Annotated[int, Entry("output_tokens", Whole(), "tokens of an answer")]
    arrivals_per_s: Annotated[
        float | None,
        Entry("arrivals", Amount(RATE, positive=True, most=1e6), "sessions of all clients together, by their shares"),
    ] = None
    sessions: Annotated[
        int | None,
        Entry("sessions", Whole(most=10**6), "sessions at the same time to plan for; none: from the arrivals"),
    ] = None

    @property
    def session_tokens(self) -> int:
        """Tokens that a session's attention cache holds in the end."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster(Record):
    """Everything the planner has to know, as people write it down. Raises ClusterError for what does not fit."""

    WHAT = "cluster"

    name: Annotated[str | None, Entry("name", Name(), "what the cluster is called")] = None
    model: Annotated[ModelSpec, Entry("model", Nested(ModelSpec), "the model that is served")]
    workload: Annotated[Workload, Entry("workload", Nested(Workload), "what sessions look like")]
    servers: Annotated[
        tuple[ServerSpec, ...], Entry("servers", Many(ServerSpec, copies=True), "the machines that hold blocks")
    ]
    clients: Annotated[tuple[ClientSpec, ...], Entry("clients", Many(ClientSpec), "where people ask from")]
    network: Annotated[Network, Entry("network", Nested(Network), "how far machines are from each other")]

    def _check(self) -> None:
        self._check_names()
        self._check_length()
        self._check_demand()
        for server in self.servers:
            self._check_server(server)
        places = self.network.places
        if places is not None:
            for kind, hosts in (("servers", self.servers), ("clients", self.clients)):
                for host in hosts:
                    self._check_place(kind, host, places)

    def demand_per_s(self) -> tuple[float, ...]:
        """Sessions that each client starts."""
        if self.workload.arrivals_per_s is None:
            return tuple(client.requests_per_s or 0.0 for client in self.clients)
        total = sum(client.share for client in self.clients)
        return tuple(self.workload.arrivals_per_s * client.share / total for client in self.clients)

    def _check_names(self) -> None:
        for kind, hosts in (("servers", self.servers), ("clients", self.clients)):
            name, times = Counter(str(host.id) for host in hosts).most_common(1)[0]
            if times > 1:
                raise ClusterError((kind,), f"{times} of them are called {name!r}: give each a name of its own.")

    def _check_length(self) -> None:
        longest = self.model.max_tokens
        if longest is not None and self.workload.session_tokens > longest:
            raise ClusterError(
                ("workload",),
                f"a session has {self.workload.session_tokens} tokens, but {self.model.name} takes {longest}: "
                "shorten prompt_tokens or output_tokens.",
            )

    def _check_demand(self) -> None:
        for client in self.clients:
            where = ("clients", Called(client.id))
            if self.workload.arrivals_per_s is None and client.requests_per_s is None:
                raise ClusterError(where, "how often it asks is not known: give its requests, or workload.arrivals.")
            if self.workload.arrivals_per_s is not None and client.requests_per_s is not None:
                raise ClusterError((*where, "requests"), "is given beside workload.arrivals: keep one of them.")
        if not any(self.demand_per_s()):
            raise ClusterError(("clients",), "nobody asks anything: give at least one of them requests above 0.")

    def _check_server(self, server: ServerSpec) -> None:
        where = ("servers", Called(server.id))
        if server.blocks is not None and server.blocks[1] > self.model.num_blocks:
            raise ClusterError(
                (*where, "blocks"),
                f"{self.model.name} has {self.model.num_blocks} blocks: choose among 0:{self.model.num_blocks}.",
            )
        if server.gpu is not None and self.model.active_parameters is None:
            for key, time in (("decode_block", server.decode_block), ("prefill_block", server.prefill_block)):
                if time is None:
                    raise ClusterError(
                        where, f"to estimate {key} from its gpu, model.active_parameters is needed: give one of them."
                    )
        if server.relayed and self.network.relay_extra_s is None:
            raise ClusterError(
                ("network",), f"{server.id} is reached through a relay: give relay_extra, what that adds to an RTT."
            )

    def _check_place(self, kind: str, host: ServerSpec | ClientSpec, places: frozenset[str]) -> None:
        place = host.place or host.id
        if place not in places:
            shown = ", ".join(sorted(places)[:12]) + (", …" if len(places) > 12 else "")
            what = "place" if host.place else "name, taken for its place,"
            raise ClusterError(
                (kind, Called(host.id), "place"), f"its {what} {place!r} is not in the network: use one of {shown}."
            )
