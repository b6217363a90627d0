"""Servers: what they say of themselves, what they serve, and when they are gone."""

from geopetals.cluster import ServerSpec
from geopetals.coordinator.core.desk import Desk
from geopetals.coordinator.core.links import Links
from geopetals.coordinator.core.members import Server
from geopetals.coordinator.core.placer import Placer
from geopetals.coordinator.core.planning import Planning
from geopetals.coordinator.core.prices import Prices
from geopetals.coordinator.core.profile import server_spec
from geopetals.coordinator.core.settings import ModelFacts, Settings
from geopetals.coordinator.messages import Register, Report, Span
from geopetals.errors import GeoPetalsError

_FORGET_S = 600.0
"""A server that is gone for so long is forgotten."""
_MANY = 3
"""Fewer than so many may well be lost together by themselves."""


class Fleet:
    """`servers` and `specs` are the core's own, and changed here alone."""

    def __init__(
        self,
        model: ModelFacts,
        settings: Settings,
        servers: dict[str, Server],
        specs: dict[str, ServerSpec],
        links: Links,
        desk: Desk,
        placer: Placer,
        prices: Prices,
        planning: Planning,
    ) -> None:
        self._model, self._settings, self._servers, self._specs = model, settings, servers, specs
        self._links, self._desk, self._placer, self._prices, self._planning = links, desk, placer, prices, planning
        self.outage_s = 0.0
        """When the last outage was that seems the coordinator's own: servers are waited for since then."""

    def registered(self, peer: str, register: Register, now: float) -> bool:
        """Whether the server is one that can be planned with."""
        try:
            spec = server_spec(peer, register.profile, register.limits, self._model)
        except GeoPetalsError as error:
            self._placer.explain("server refused", f"{peer}: {error}", now)
            return False
        server, held = self._servers.get(peer), self._valid(register.held)
        is_as_it_was = server is not None and _is_same(server, register, held)
        was_present = server is not None and server.present
        if server is None:
            server = self._servers[peer] = Server(peer=peer, register=register)
        elif not is_as_it_was:
            self._desk.leases.leave_server(peer, now)
        server.register, server.held, server.away_since, server.heard_at = register, held, None, now
        server.assigned, server.moving, server.serving = held, False, None
        server.epoch = max(server.epoch, register.epoch)
        if held is not None:
            self._placer.target.setdefault(peer, held)
        self._price(server, spec, now)
        if is_as_it_was and (held is not None or was_present):
            return True
        if held is None:
            self._placer.target.pop(peer, None)
            if not self._planning.is_enough(now):
                self._take_gap(server, now)
        self._placer.ask(f"{register.name or peer} joined", now, members=held is None and not was_present)
        return True

    def reported(self, server: Server, report: Report, now: float) -> None:
        """What it says of its blocks and of its cache."""
        span = self._valid(report.span)
        server.held, server.heard_at = span, now
        if not server.moving or report.epoch == server.epoch:  # otherwise it has not heard of its assignment yet
            self._follow(server, report, span, now)
        self._count_sessions(server, report, now)
        self._prices.offer(server, now)

    def lost(self, server: Server, now: float) -> None:
        """It may be back in a moment."""
        server.away_since, server.serving = now, None
        self._prices.offer(server, now)
        if self._is_own_outage(now):
            self.outage_s = now

    def gone(self, server: Server, how: str, now: float) -> None:
        """It will not come back soon."""
        if server.present:
            self.lost(server, now)
        server.assigned, server.held, server.moving, server.reported = None, None, False, {}
        self._placer.target.pop(server.peer, None)
        self._desk.leases.leave_server(server.peer, now)
        missing = not self._placer.covers(self._placer.holding())
        self._placer.ask(f"{server.register.name or server.peer} {how}", now, at_once=missing, members=True)

    def watch(self, server: Server, now: float) -> None:
        """Time has passed."""
        settings = self._settings
        if server.present and now - server.heard_at >= settings.silent_s:
            self.lost(server, now)
        if server.away_since is not None:
            away_s = now - server.away_since
            is_over = away_s >= settings.server_grace_s and now >= self.outage_s + settings.return_s
            if is_over and server.assigned is not None:
                self.gone(server, "was lost", now)
            if away_s >= _FORGET_S and not self._desk.leases.uses(server.peer):
                self._forget(server, now)
        elif server.moving and now - server.assigned_at > settings.load_timeout_s:
            self._load_failed(server, "it took too long", None, now)

    def restarted(self, now: float) -> None:
        """Nobody could be heard until now."""
        for server in self._servers.values():
            server.heard_at = now
            if server.away_since is not None:
                server.away_since = now
            if server.moving:
                server.assigned_at = now
        self.outage_s = now

    def is_returning(self, now: float) -> bool:
        """Whether servers are waited for after an outage of the coordinator's own; no plan is made meanwhile."""
        return now < self.outage_s + self._settings.return_s and any(
            server.assigned is not None and (not server.present or server.heard_at <= self.outage_s)
            for server in self._servers.values()
        )

    def _is_own_outage(self, now: float) -> bool:
        """Most servers were lost at about the same time: rather the coordinator's own network than theirs.

        If nobody is left there is nothing to be done anyway.
        """
        present = sum(server.present for server in self._servers.values())
        since = now - self._settings.server_grace_s
        away = [each for each in self._servers.values() if each.away_since is not None and each.assigned is not None]
        lost = sum((each.away_since or now) >= since for each in away)
        return not present or (lost >= _MANY and lost > present)

    def _price(self, server: Server, spec: ServerSpec, now: float) -> None:
        """Arrays are made anew only for another machine: whoever registers again and again must not cost that."""
        if self._specs.get(server.peer) == spec:
            self._prices.offer(server, now)
            return
        self._specs[server.peer] = spec
        self._prices.rebuild(now)

    def _take_gap(self, server: Server, now: float) -> None:
        """Blocks are missing: it takes some at once."""
        span = self._planning.gap_for(server, now)
        if span is not None:
            self._placer.target[server.peer] = span
            self._placer.assign(server, span, "these blocks have no server", now)
            why = f"{server.peer} takes {span.start}:{span.end}, since all together lack memory for the model."
            self._placer.explain("server joined", why, now)

    def _follow(self, server: Server, report: Report, span: Span | None, now: float) -> None:
        if report.state == "failed":
            self._load_failed(server, report.error, span, now)
        elif report.state == "ready":
            if span is not None and (server.moving or span != server.serving):
                self._ready(server, span, report.load_s, now)
        else:
            server.serving = None
            if server.assigned is None:
                server.moving = False
            elif not server.moving:
                server.moving, server.assigned_at = True, now
            if report.state == "loading":
                self._desk.leases.leave_server(server.peer, now)

    def _ready(self, server: Server, span: Span, load_s: float | None, now: float) -> None:
        if server.moving and span != server.assigned:
            self._load_failed(server, "it is ready with other blocks", span, now)
        was_moving = server.moving
        server.moving, server.assigned, server.serving = False, span, span
        server.load_s = load_s if load_s is not None else server.load_s
        if was_moving:
            self._desk.leases.leave_server(server.peer, now)
            server.failures = 0
        self._placer.target.setdefault(server.peer, span)

    def _load_failed(self, server: Server, error: str, kept: Span | None, now: float) -> None:
        if server.moving:
            self._placer.failed(server, error, kept, now)
            self._placer.ask(f"{server.register.name or server.peer} could not load", now, members=True)
        server.serving = None

    def _count_sessions(self, server: Server, report: Report, now: float) -> None:
        """Cache that is held beside what is booked is not there to be given."""
        total = report.cache.total
        server.cache, server.reported = report.cache, {}
        for use in report.sessions:
            # Nothing holds more than there is, whatever the server says: sums stay numbers that can be written down.
            server.reported[use.session_id] = min(server.reported.get(use.session_id, 0) + use.block_tokens, total)
            self._desk.progress(use.session_id, use.tokens_used, now)
        booked = sum(
            min(block_tokens, self._desk.leases.booked_block_tokens(session_id, server.peer, if_closed=block_tokens))
            for session_id, block_tokens in server.reported.items()
        )
        used = min(max(total - report.cache.free, sum(server.reported.values())), total)
        server.foreign = max(used - booked, 0)

    def _forget(self, server: Server, now: float) -> None:
        del self._servers[server.peer], self._specs[server.peer]
        self._prices.rebuild(now)

    def _valid(self, span: Span | None) -> Span | None:
        return span if span is not None and 0 <= span.start < span.end <= self._model.num_blocks else None


def _is_same(server: Server, register: Register, held: Span | None) -> bool:
    """Whether it is back with what it had, so that sessions and plans can go on."""
    return (held, held, register.limits) == (
        server.held,
        server.assigned if held is None else held,
        server.register.limits,
    )
