"""When plans are made, of which cluster, and what becomes of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from geopetals.cluster import ServerSpec
from geopetals.coordinator.core.actions import Action, MakePlan
from geopetals.coordinator.core.demand import Demand
from geopetals.coordinator.core.links import Links
from geopetals.coordinator.core.members import Client, Server
from geopetals.coordinator.core.placer import Placer
from geopetals.coordinator.core.planner import fill, make_plan, placement_of
from geopetals.coordinator.core.plans import Plans
from geopetals.coordinator.core.prices import Prices
from geopetals.coordinator.core.settings import ModelFacts, Settings
from geopetals.coordinator.core.subject import PlanJob, Subject
from geopetals.coordinator.core.view import Work, plan_clients, problem_of
from geopetals.coordinator.messages import Span

_PLAN_CLIENTS = 20
"""Clients whose demand is planned for one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenJob:
    """A plan that is being made."""

    job: PlanJob
    work: Work
    reason: str
    members: bool


class Planning:
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
        placer: Placer,
        prices: Prices,
        out: list[Action],
        *,
        seed: int,
    ) -> None:
        self._model, self._settings, self._seed = model, settings, seed
        self._servers, self._specs, self._clients = servers, specs, clients
        self._links, self._demand, self._placer, self._prices, self._out = links, demand, placer, prices, out
        self.open_job: OpenJob | None = None
        self.planned_on: Subject | None = None
        """What the last plan was made of; not part of a snapshot."""
        self.made_count = 0
        self._planned_rate = 0.0
        self._demand_checked = 0.0

    def run(self, now: float) -> None:
        """Make a plan if one is due."""
        due = self._placer.due
        if due is None or self.open_job is not None or not self._placer.is_due(now, self._unmeasured):
            return
        self._placer.due = None
        present = self._planned_for(now)
        if not present:
            return
        work = self._mean_work(now)
        self.made_count += 1
        rates = [each.register.profile.load_bytes_s or self._settings.load_bytes_per_s for each in present]
        job = PlanJob(
            number=self.made_count,
            subject=self._subject(work, present, now),
            holding=self._placer.holding(),
            horizon_s=self._settings.horizon_s,
            block_load_s=self._model.block_bytes * sum(1 / rate for rate in rates) / len(rates),
            seed=self._seed,
        )
        self.open_job = OpenJob(job=job, work=work, reason=due.reason, members=due.members)
        if self._settings.plan_inline:
            self.made(make_plan(job), now)
        else:
            self._out.append(MakePlan(number=job.number))

    def made(self, plans: Plans, now: float) -> None:
        """Decide on a plan, unless the swarm has changed since it was asked for."""
        opened = self.open_job
        if opened is None or opened.job.number != plans.number:
            return
        self.open_job = None
        job, work = opened.job, opened.work
        names = {server.peer for server in self._planned_for(now)}
        if names != set(job.subject.names()) or job.holding != self._placer.holding():
            self._placer.ask(opened.reason, now, at_once=True, members=opened.members)
            return
        self._placer.decide(plans, work.arrivals_per_s, opened.reason, now, members=opened.members)
        self.planned_on, self._planned_rate, self._demand_checked = job.subject, work.arrivals_per_s, now
        before = self._prices.work
        if (work.prompt_tokens, work.output_tokens) != (before.prompt_tokens, before.output_tokens):
            self._prices.rework(work, now)

    def subject(self, now: float) -> Subject | None:
        """Of the last plan, or of now if there was none; None without servers."""
        present = self._planned_for(now)
        if self.planned_on is not None or not present:
            return self.planned_on
        return self._subject(self._mean_work(now), present, now)

    def is_enough(self, now: float) -> bool:
        """Whether all blocks fit into the memory of those that are there, so that a plan of all can be made."""
        specs = [self._specs[server.peer] for server in self._planned_for(now)]
        room = [min(spec.memory_bytes // self._model.block_bytes, spec.max_blocks or 0) for spec in specs]
        return sum(room) >= self._model.num_blocks

    def gap_for(self, server: Server, now: float) -> Span | None:
        """What one more server takes at once, while all others keep their blocks."""
        work, names = self._mean_work(now), [each.peer for each in self._present()]
        clients = plan_clients(work)
        rtts, _ = self._links.matrix(clients, names)
        problem = problem_of(self._model, work, [self._specs[name] for name in names], clients, rtts)
        own = names.index(server.peer)
        pins = tuple(pin if row == own else None for row, pin in enumerate(problem.pinned))
        return fill(replace(problem, pinned=pins), placement_of(problem, names, self._placer.holding()), own)

    def watch_demand(self, now: float) -> None:
        """Ask for a plan if the load is another than the last one was made for."""
        settings = self._settings
        if now - self._demand_checked < settings.check_demand_s or not self._planned_rate:
            return
        self._demand_checked = now
        ratio = self._demand.rate_per_s(now) / self._planned_rate
        if not 1 / (1 + settings.drift) <= ratio <= 1 + settings.drift:
            self._placer.ask("the load has changed", now)

    def restarted(self, now: float) -> None:
        """A plan that was being made, or was due, is due from now on: the same whether or not a snapshot was taken."""
        opened, self.open_job = self.open_job, None
        if opened is not None:
            self._placer.ask(opened.reason, now, at_once=True, members=opened.members)
        if self._placer.due is not None:
            self._placer.due.first_s = self._placer.due.last_s = now

    def to_dict(self) -> dict[str, Any]:
        opened = self.open_job
        return {
            "made": self.made_count,
            "planned_rate": self._planned_rate,
            "demand_checked": self._demand_checked,
            "under_way": None if opened is None else [opened.reason, opened.members],
        }

    def restore(self, raw: dict[str, Any], now: float) -> None:
        """A plan that was being made is asked for again."""
        self.made_count, self._planned_rate = raw["made"], raw["planned_rate"]
        self._demand_checked = raw["demand_checked"]
        if raw["under_way"] is not None:
            reason, members = raw["under_way"]
            self._placer.ask(reason, now, at_once=True, members=members)

    def _mean_work(self, now: float) -> Work:
        prompt, output = self._demand.tokens()
        shares = self._demand.shares(now, _PLAN_CLIENTS)
        known = {client: share for client, share in shares.items() if client in self._clients}
        total = sum(known.values())
        return Work(
            prompt_tokens=prompt,
            output_tokens=output,
            arrivals_per_s=self._demand.rate_per_s(now),
            shares={client: share / total for client, share in known.items()},
        )

    def _subject(self, work: Work, present: list[Server], now: float) -> Subject:
        """Those that are there; who failed to load keeps what it has."""
        rtts, _ = self._links.matrix(plan_clients(work), [server.peer for server in present])
        specs = tuple(self._spec(server, now) for server in present)
        return Subject(model=self._model, work=work, servers=specs, rtts=rtts, name=self._model.name[:100])

    def _spec(self, server: Server, now: float) -> ServerSpec:
        spec = self._specs[server.peer]
        if now >= server.penalty_until or server.assigned is None:
            return spec
        return replace(spec, blocks=(server.assigned.start, server.assigned.end), max_blocks=None)

    def _present(self) -> list[Server]:
        return [server for server in self._servers.values() if server.present]

    def _planned_for(self, now: float) -> list[Server]:
        """Who failed to load and holds nothing is left out for a while."""
        return [each for each in self._present() if each.assigned is not None or now >= each.penalty_until]

    def _unmeasured(self) -> bool:
        """Whether somebody's links to the others are not known at all."""
        present = {server.peer for server in self._present()}
        return len(present) > 1 and any(present.isdisjoint(self._links.partners.get(peer, ())) for peer in present)
