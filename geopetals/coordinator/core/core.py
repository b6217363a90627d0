"""The state machine: events in, actions out."""

from collections.abc import Callable
from typing import Any

from geopetals.cluster import Cluster, ServerSpec
from geopetals.coordinator.core import events as ev
from geopetals.coordinator.core import snapshot, status
from geopetals.coordinator.core.actions import Action, ProbeLinks
from geopetals.coordinator.core.demand import Demand
from geopetals.coordinator.core.desk import Desk
from geopetals.coordinator.core.fleet import Fleet
from geopetals.coordinator.core.links import Links
from geopetals.coordinator.core.members import Client, Server
from geopetals.coordinator.core.placer import Placer
from geopetals.coordinator.core.planning import Planning
from geopetals.coordinator.core.prices import Prices
from geopetals.coordinator.core.settings import ModelFacts, Settings
from geopetals.coordinator.core.subject import PlanJob, Subject
from geopetals.coordinator.messages import LinkSample, Span

_ABOUT_SESSIONS = (
    ev.SessionAsked,
    ev.SessionCancelled,
    ev.SessionResumed,
    ev.SessionsHeld,
    ev.SessionExtended,
    ev.SessionClosed,
)
"""Nothing about servers follows from these."""


class Core:
    """One swarm. `now` is any clock that does not go backwards, also not over restarts: Unix time, live."""

    def __init__(self, model: ModelFacts, settings: Settings | None = None, *, seed: int = 0) -> None:
        self.model, self.settings = model, settings or Settings()
        self.now = 0.0
        self.servers: dict[str, Server] = {}
        self.specs: dict[str, ServerSpec] = {}
        self.clients: dict[str, Client] = {}
        self._out: list[Action] = []
        self.links, self.demand = Links(self.settings), Demand(self.settings)
        self.placer = Placer(model, self.settings, self.servers, self._out)
        self.desk = Desk(self.settings, self.demand, self.placer.cover_s, self._out)
        members = (self.servers, self.specs, self.clients)
        self.prices = Prices(model, self.settings, *members, self.links, self.demand, self.desk)
        self.planning = Planning(
            model, self.settings, *members, self.links, self.demand, self.placer, self.prices, self._out, seed=seed
        )
        self.fleet = Fleet(
            model,
            self.settings,
            self.servers,
            self.specs,
            self.links,
            self.desk,
            self.placer,
            self.prices,
            self.planning,
        )
        self._handlers = self._all_handlers()

    def apply(self, event: ev.Event, now: float) -> tuple[Action, ...]:
        """What follows from the event. An instant before the last one counts as the last one."""
        self.now = now = max(now, self.now)
        try:
            self._apply(event, now)
            return tuple(self._out)
        finally:
            self._out.clear()

    def next_due_s(self) -> float:
        """The instant at which a Tick is wanted, besides the regular ones; inf: none."""
        return self.desk.next_due_s()

    def knows(self, peer: str) -> bool:
        """Whether the server is registered, be it away or not."""
        return peer in self.servers

    def hears(self, peer: str) -> bool:
        """Whether the server is registered and there; otherwise its reports say nothing: it is to register again."""
        server = self.servers.get(peer)
        return server is not None and server.present

    def assignment(self, peer: str) -> tuple[int, Span | None]:
        """The epoch, and what a registered server is to hold."""
        server = self.servers[peer]
        return server.epoch, server.assigned

    def plan_job(self, number: int) -> PlanJob | None:
        """What MakePlan asks for; None if it is no longer wanted."""
        opened = self.planning.open_job
        return opened.job if opened is not None and opened.job.number == number else None

    def subject(self) -> Subject | None:
        """What the last plan was made of, or what one would be made of now if there was none; None without servers."""
        return self.planning.subject(self.now)

    def cluster(self) -> Cluster | None:
        """The cluster of `subject`: `geopetals plan --objective push` gives that plan."""
        subject = self.subject()
        return None if subject is None else subject.cluster

    def snapshot(self) -> dict[str, Any]:
        """Everything, as plain values: `restore` of it goes on as if nothing had happened."""
        return snapshot.take(self)

    def restore(self, raw: dict[str, Any]) -> None:
        """Into a new core of the same model and settings. Raises KeyError or ValueError for what is no snapshot."""
        snapshot.restore(self, raw)

    def status(self, now: float) -> dict[str, Any]:
        """For people and the dashboard, as plain values."""
        return status.of(self, max(now, self.now))

    def _apply(self, event: ev.Event, now: float) -> None:
        self._handlers[type(event)](event, now)
        if isinstance(event, _ABOUT_SESSIONS):
            return
        self._refresh_prices(now)
        if self.fleet.is_returning(now):
            return
        self.planning.run(now)
        for peer in self.placer.drive(now):
            self.prices.offer(self.servers[peer], now)

    def _all_handlers(self) -> dict[type, Callable[[Any, float], None]]:
        return {
            ev.ServerRegistered: self._registered,
            ev.ServerReported: self._reported,
            ev.ServerLost: self._server_lost,
            ev.ServerLeft: self._server_left,
            ev.LinksMeasured: lambda event, now: self._measured(event.peer, event.links, now),
            ev.ClientSeen: lambda event, now: self._client_seen(event.client, event.links, now),
            ev.ClientLost: self._client_lost,
            ev.SessionAsked: self._asked,
            ev.SessionCancelled: lambda event, now: self.desk.cancel(event.client, event.session_id, now),
            ev.SessionResumed: self._resumed,
            ev.SessionsHeld: lambda event, now: self.desk.keep_only(
                event.client, event.sessions, event.asked_before_s, now
            ),
            ev.SessionExtended: lambda event, now: self.desk.extend(
                event.client, event.session_id, event.max_length, now
            ),
            ev.SessionClosed: lambda event, now: self.desk.close(event.client, event.session_id, event.measured, now),
            ev.Tick: self._tick,
            ev.Restarted: self._restarted,
            ev.ReplanAsked: lambda event, now: self.placer.ask(event.reason or "asked for", now, at_once=True),
            ev.PlanMade: lambda event, now: self.planning.made(event.plans, now),
        }

    def _registered(self, event: ev.ServerRegistered, now: float) -> None:
        if self.fleet.registered(event.peer, event.register, now):
            self._probe(event.peer, self.servers[event.peer], now)

    def _reported(self, event: ev.ServerReported, now: float) -> None:
        server = self.servers.get(event.peer)
        if server is not None and server.present:
            self._measured(server.peer, event.report.links, now)
            self.links.came(server.peer, event.report.rates)
            self.fleet.reported(server, event.report, now)

    def _server_lost(self, event: ev.ServerLost, now: float) -> None:
        server = self.servers.get(event.peer)
        if server is not None and server.present:
            self.fleet.lost(server, now)

    def _server_left(self, event: ev.ServerLeft, now: float) -> None:
        server = self.servers.get(event.peer)
        if server is not None:
            self.fleet.gone(server, "left", now)

    def _client_seen(self, client: str, links: tuple[LinkSample, ...], now: float) -> None:
        known = self.clients.get(client)
        if known is None:
            known = self.clients[client] = Client(peer=client)
            self.prices.new_rows = True
            self._probe(client, known, now)
        known.away_since = None
        self._measured(client, links, now)

    def _client_lost(self, event: ev.ClientLost, now: float) -> None:
        client = self.clients.get(event.client)
        if client is not None and client.away_since is None:
            client.away_since = now

    def _restarted(self, event: ev.Restarted, now: float) -> None:
        del event
        self.fleet.restarted(now)
        for client in self.clients.values():
            if client.away_since is not None:
                client.away_since = now
        self.desk.back_s = now
        self.planning.restarted(now)

    def _asked(self, event: ev.SessionAsked, now: float) -> None:
        if event.client not in self.clients or event.open.links:
            self._client_seen(event.client, event.open.links, now)
        self._refresh_prices(now)
        self.desk.ask(event.client, event.open, now, group=event.group)

    def _resumed(self, event: ev.SessionResumed, now: float) -> None:
        edges = [0, *(hop.end for hop in event.chain)]
        is_whole = edges[-1] == self.model.num_blocks
        if not is_whole or any(
            hop.start != edge or hop.end <= edge for hop, edge in zip(event.chain, edges, strict=False)
        ):
            return  # no chain of this model
        self.desk.resume(
            event.client, event.session_id, event.batch, event.max_length, event.chain, event.tokens_used, now
        )

    def _measured(self, peer: str, links: tuple[LinkSample, ...], now: float) -> None:
        for link in links:
            if link.peer_id in self.servers:
                self.links.add(peer, link.peer_id, link.rtt_s, now, relayed=link.relayed)

    def _refresh_prices(self, now: float) -> None:
        if self.prices.refresh(now) >= self.settings.drift:
            self.placer.ask("links have changed", now)

    def _probe(self, peer: str, member: Server | Client, now: float) -> None:
        """Have it measure the servers whose links to it are the least known."""
        member.probed = now
        others = [other for other, server in self.servers.items() if other != peer and server.present]
        oldest = sorted(others, key=lambda other: (self.links.measured_at(peer, other), other))
        if oldest:
            self._out.append(ProbeLinks(peer=peer, peers=tuple(oldest[: self.settings.probes])))

    def _tick(self, event: ev.Tick, now: float) -> None:
        del event
        for server in list(self.servers.values()):
            self.fleet.watch(server, now)
        for client in [each for each in self.clients.values() if each.away_since is not None]:
            if now - (client.away_since or now) >= self.settings.lease_s:
                self.desk.lose_client(client.peer, now, "its client is gone")
                del self.clients[client.peer]
        members: dict[str, Server | Client] = {**self.servers, **self.clients}
        for peer, member in members.items():
            if member.away_since is None and now - member.probed >= self.settings.probe_s:
                self._probe(peer, member, now)
        self.desk.tick(now)
        self.planning.watch_demand(now)
