"""What routing goes by: times and links of all members as arrays, made again when something has changed noticeably."""

from collections.abc import Mapping
from typing import Any

from geopetals.cluster import ServerSpec
from geopetals.coordinator.core.books import Books, Capacity
from geopetals.coordinator.core.demand import Demand
from geopetals.coordinator.core.desk import Desk
from geopetals.coordinator.core.links import Links
from geopetals.coordinator.core.members import Client, Server
from geopetals.coordinator.core.settings import ModelFacts, Settings
from geopetals.coordinator.core.view import ANYONE, Work, routing_world
from geopetals.simulation import World

_SPARE_ROWS = 64
"""Rows of clients that are gone are kept until there are so many, and more than of those that are there."""


class Prices:
    """`servers`, `specs` and `clients` are the core's own."""

    def __init__(
        self,
        model: ModelFacts,
        settings: Settings,
        servers: Mapping[str, Server],
        specs: Mapping[str, ServerSpec],
        clients: Mapping[str, Client],
        links: Links,
        demand: Demand,
        desk: Desk,
    ) -> None:
        self._model, self._settings = model, settings
        self._servers, self._specs, self._clients = servers, specs, clients
        self._links, self._demand, self._desk = links, demand, desk
        prompt, output = demand.tokens()
        self.work = Work(prompt_tokens=prompt, output_tokens=output, arrivals_per_s=1.0, shares={})
        """Sessions as routing prices them."""
        self.client_rows: list[str] = [ANYONE]
        self.new_rows = False
        """Whether there are clients without a row."""
        self._priced_at = 0.0

    def rebuild(self, now: float) -> None:
        """Servers have come or gone."""
        for member in [
            each for each in self._links.partners if each not in self._servers and each not in self._clients
        ]:
            self._links.forget(member)
        for client in [each for each in self._demand.clients() if each not in self._clients]:
            self._demand.forget(client, now)
        self._links.take(self._servers)
        self.client_rows = [ANYONE, *self._clients]
        self._priced_at, self.new_rows = now, False
        capacities = {peer: self.capacity(server) for peer, server in self._servers.items()}
        books = Books(self.world(), list(self._servers), self.client_rows, capacities) if self._servers else None
        self._desk.rebuilt(books, now)

    def rework(self, work: Work, now: float) -> None:
        """Sessions have become other ones on average: they are priced anew, and what is booked stays."""
        self.work = work
        if self._desk.books is not None:
            self._desk.books.reprice(self.world(), self.client_rows)
            self._desk.changed(now)

    def refresh(self, now: float) -> float:
        """Take links into account that have changed, and new clients; not for every one of them.

        Gives the largest relative change of a link between servers; inf: a new one.
        """
        books = self._desk.books
        if books is None or not (self.new_rows or self._links.touched):
            return 0.0
        if now < self._priced_at + self._settings.reprice_s:
            return 0.0
        if len(self.client_rows) > 2 * len(self._clients) + _SPARE_ROWS:
            self.rebuild(now)
            return 0.0
        any_change, change = self._links.take(self._servers)
        self._priced_at = now
        if any_change or self.new_rows:
            known = set(self.client_rows)
            self.client_rows += [client for client in self._clients if client not in known]
            self.new_rows = False
            books.reprice(self.world(), self.client_rows)
            self._desk.changed(now)
        return change

    def capacity(self, server: Server) -> Capacity:
        """What it offers to new sessions."""
        if server.serving is None or server.cache is None or not server.present:
            return Capacity(span=None, pages=0, most_pages=0)
        free = max(server.cache.total - server.foreign, 0)
        page = self._settings.page_tokens
        return Capacity(span=server.serving, pages=free // page, most_pages=server.cache.total // page)

    def offer(self, server: Server, now: float) -> None:
        """What it offers may have changed."""
        books = self._desk.books
        if books is None:
            return
        before, after = books.capacity[server.peer], self.capacity(server)
        if after == before:
            return
        books.offer(server.peer, after, now)
        if after.span != before.span:
            self._desk.changed(now)
        elif after.pages > before.pages:
            self._desk.freed(server.peer, now)
        else:
            self._desk.waiting.stale = True

    def world(self) -> World:
        """Servers and clients as routing knows them, by the links in force."""
        rtts, _ = self._links.matrix(self.client_rows, list(self._servers))
        specs = [self._specs[peer] for peer in self._servers]
        page_tokens = self._settings.page_tokens
        return routing_world(self._model, self.work, specs, self.client_rows, rtts, page_tokens=page_tokens)

    def to_dict(self) -> dict[str, Any]:
        return {
            "work": [self.work.prompt_tokens, self.work.output_tokens],
            "client_rows": self.client_rows,
            "new_rows": self.new_rows,
            "priced_at": self._priced_at,
        }

    def restore(self, raw: dict[str, Any]) -> None:
        """The arrays are to be made again by whoever restores the rest."""
        prompt, output = raw["work"]
        self.work = Work(prompt_tokens=prompt, output_tokens=output, arrivals_per_s=1.0, shares={})
        self.client_rows, self.new_rows = list(raw["client_rows"]), raw["new_rows"]
        self._priced_at = raw["priced_at"]
