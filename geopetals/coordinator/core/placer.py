"""The slow loop: when to make a plan, whether to adopt it, and which server moves next.

A plan is adopted only if what sessions gain over the horizon is more than what moving costs: while servers load, their
share of the swarm is missing to the sessions that arrive. A plan that restores coverage is always adopted.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from geopetals.coordinator.core.actions import Action, Assign, Explained
from geopetals.coordinator.core.judge import covers, judge
from geopetals.coordinator.core.members import Server
from geopetals.coordinator.core.moves import Move, Standing, next_moves
from geopetals.coordinator.core.plans import Plans
from geopetals.coordinator.core.settings import ModelFacts, Settings
from geopetals.coordinator.messages import Span


@dataclass(slots=True)
class Due:
    """A plan that is going to be made."""

    reason: str
    first_s: float
    """When it was asked for first,"""
    last_s: float
    """and last."""
    now: bool = False
    """Whether to wait for nothing."""
    members: bool = False
    """Whether servers have come or gone."""


class Placer:
    """What servers are to hold, and how they get there."""

    def __init__(self, model: ModelFacts, settings: Settings, servers: Mapping[str, Server], out: list[Action]) -> None:
        self._model, self._settings, self._servers, self._out = model, settings, servers, out
        self.target: dict[str, Span] = {}
        self.due: Due | None = None
        self.explained: list[Explained] = []
        self.number = 0
        """Of the last explanation."""
        self.plan: dict[str, Any] = {}
        """The last plan that was decided on, for people."""
        self._planned_at = -float("inf")

    def ask(self, reason: str, now: float, *, at_once: bool = False, members: bool = False) -> None:
        """A plan is to be made, once things have settled."""
        due = self.due
        if due is None:
            self.due = Due(reason=reason, first_s=now, last_s=now, now=at_once, members=members)
            return
        due.members = due.members or members
        if reason not in due.reason.split("; ") and len(due.reason) < 200:
            due.reason = f"{due.reason}; {reason}"
        due.last_s, due.now = now, due.now or at_once

    def is_due(self, now: float, unmeasured: Callable[[], bool]) -> bool:
        """unmeasured: links of a server are not known yet, which is waited for a little longer."""
        due, settings = self.due, self._settings
        if due is None:
            return False
        covered = self.covers(self.holding())
        if due.now:
            return True
        if covered and not due.members and now < self._planned_at + settings.replan_s:
            return False
        if now >= due.first_s + (settings.settle_most_s if covered else 2 * settings.settle_s):
            return True
        return now >= due.last_s + self._settings.settle_s and not unmeasured()

    def holding(self) -> dict[str, Span]:
        """What servers that are there hold or load."""
        return {
            peer: server.assigned
            for peer, server in self._servers.items()
            if server.present and server.assigned is not None
        }

    def covers(self, spans: Mapping[str, Span]) -> bool:
        """Whether every block has a server."""
        return covers(spans, self._model.num_blocks)

    def cover_s(self, now: float) -> float | None:
        """When what loads now will be ready, or may be if servers come back or a plan is made; None: nobody knows."""
        if not self.covers(self.holding()):
            settings = self._settings
            if self.due is not None:
                return self.due.first_s + settings.settle_most_s
            held = {peer: each.assigned for peer, each in self._servers.items() if each.assigned is not None}
            return now + settings.server_grace_s if self.covers(held) else None
        moving = [server for server in self._servers.values() if server.present and server.moving]
        return max([server.assigned_at + self.load_s(server, server.assigned) for server in moving], default=now)

    def load_s_of(self, peer: str, span: Span) -> float:
        """From the disk of the server to ready."""
        return self.load_s(self._servers[peer], span)

    def load_s(self, server: Server, span: Span | None) -> float:
        """From its disk to ready."""
        if span is None:
            return 0.0
        profile = server.register.profile
        return (span.end - span.start) * profile.block_bytes / (profile.load_bytes_s or self._settings.load_bytes_per_s)

    def decide(self, plans: Plans, arrivals_per_s: float, reason: str, now: float, *, members: bool) -> None:
        """Adopt the new plan or another of those found, or stay. members: servers have come or gone."""
        before = self.holding()
        serving = {p: s.serving for p, s in self._servers.items() if s.serving is not None}
        verdict = judge(
            plans,
            before,
            self.load_s_of,
            horizon_s=self._settings.horizon_s,
            arrivals_per_s=arrivals_per_s,
            num_blocks=self._model.num_blocks,
            covered=self.covers(serving),
            ties_to_plan=members,
            is_reachable=self._is_reachable,
        )
        chosen, adopted, why, figures = verdict.layout, verdict.layout is not plans.stay, verdict.why, verdict.figures
        self._planned_at = now
        self.target = dict(chosen.spans)
        self.plan = {
            "number": plans.number,
            "at_s": now,
            "reason": reason,
            "adopted": adopted,
            "why": why,
            "sessions": plans.sessions,
            "session_s": chosen.session_s,
            "proposal": {} if plans.new is None else _shown(plans.new.spans),
            "target": _shown(self.target),
        }
        if self.target != before:
            self._explain(
                "plan adopted" if adopted else "idle servers filled", f"{reason}: {why}", figures, before, now
            )
        else:
            self._explain("plan kept", f"{reason}: {why}", figures, {}, now)

    def drive(self, now: float) -> list[str]:
        """Begin the moves that may begin. Gives the servers that serve nothing from now on."""
        if any(not server.present and server.assigned is not None for server in self._servers.values()):
            return []  # it may be back in a moment
        if all(self._is_settled(server) for server in self._servers.values()):
            return []
        standings = [self._standing(server, self.target) for server in self._servers.values() if server.present]
        moves = next_moves(self._model.num_blocks, standings)
        if moves is None:
            self._give_up(standings, now)
            return []
        for move in moves:
            self._begin(move, now)
        return [move.peer for move in moves]

    def assign(self, server: Server, span: Span | None, reason: str, now: float) -> None:
        """Tell a server what to hold."""
        server.epoch += 1
        drain_s = self._settings.drain_s if server.serving is not None else 0.0
        server.assigned, server.assigned_at = span, now
        server.moving, server.serving = True, None
        self._out.append(Assign(peer=server.peer, epoch=server.epoch, span=span, reason=reason, drain_s=drain_s))

    def failed(self, server: Server, error: str, kept: Span | None, now: float) -> None:
        """It could not load what it was assigned: it keeps what it has for a while."""
        settings, wanted = self._settings, server.assigned
        server.failures += 1
        server.penalty_until = now + settings.penalty_s * 2 ** min(server.failures - 1, 10)
        server.moving, server.assigned = False, kept
        if kept is None:
            self.target.pop(server.peer, None)
        else:
            self.target[server.peer] = kept
        self._explain(
            "load failed",
            f"{server.peer} could not load {_text(wanted)} ({error or 'no reason given'}): it keeps {_text(kept)} for "
            f"{server.penalty_until - now:.0f} s.",
            {"failures": float(server.failures)},
            {},
            now,
        )

    def explain(self, what: str, why: str, now: float) -> None:
        self._explain(what, why, {}, {}, now)

    def to_dict(self) -> dict[str, Any]:
        due = self.due
        return {
            "target": {peer: list(span) for peer, span in self.target.items()},
            "due": None if due is None else [due.reason, due.first_s, due.last_s, due.now, due.members],
            "explained": [entry.to_dict() for entry in self.explained],
            "number": self.number,
            "plan": self.plan,
            "planned_at": None if self._planned_at < 0 else self._planned_at,
        }

    def restore(self, raw: dict[str, Any]) -> None:
        self.target = {peer: Span(*span) for peer, span in raw["target"].items()}
        due = raw["due"]
        self.due = None if due is None else Due(*due)
        self.number, self.plan = raw["number"], raw["plan"]
        self.explained = [Explained.from_dict(entry) for entry in raw["explained"]]
        self._planned_at = -float("inf") if raw["planned_at"] is None else raw["planned_at"]

    def _is_reachable(self, spans: Mapping[str, Span]) -> bool:
        """Whether there is a way that keeps all blocks served, if they are."""
        present = [server for server in self._servers.values() if server.present]
        return next_moves(self._model.num_blocks, [self._standing(each, spans) for each in present]) is not None

    def _is_settled(self, server: Server) -> bool:
        """Whether it is where it is to be, or on its way."""
        if not server.present or (server.serving is None and server.assigned is not None):
            return True
        return server.serving == self.target.get(server.peer, server.serving)

    def _standing(self, server: Server, targets: Mapping[str, Span]) -> Standing:
        target = targets.get(server.peer, server.assigned)
        most = min(
            server.register.limits.memory_bytes or server.register.profile.memory_bytes,
            server.register.profile.memory_bytes,
        )
        return Standing(
            peer=server.peer,
            serving=server.serving,
            target=target,
            # One that has not said yet that it is ready is not to be moved either.
            arriving=server.assigned if server.serving is None else None,
            most_blocks=int(most // server.register.profile.block_bytes),
        )

    def _begin(self, move: Move, now: float) -> None:
        server = self._servers[move.peer]
        reason = "plan" if not move.detour else "for a while, so that another can move"
        self.assign(server, move.span, reason, now)

    def _give_up(self, standings: list[Standing], now: float) -> None:
        left = {each.peer: each.target for each in standings if each.serving != each.target and each.arriving is None}
        for each in standings:
            if each.peer in left:
                if each.serving is None:
                    self.target.pop(each.peer, None)
                else:
                    self.target[each.peer] = each.serving
        names = ", ".join(f"{peer} to {_text(span)}" for peer, span in left.items())
        self._explain("moves given up", f"No order of moves keeps all blocks served: {names}.", {}, {}, now)

    def _explain(
        self, what: str, why: str, figures: Mapping[str, float], replaced: Mapping[str, Span], now: float
    ) -> None:
        self.number += 1
        entry = Explained(
            number=self.number,
            at_s=now,
            what=what,
            why=why[:500],
            predicted=json.dumps(figures),
            replaced=json.dumps(_shown(replaced)),
        )
        self.explained.append(entry)
        del self.explained[: -self._settings.history]
        self._out.append(entry)


def _shown(spans: Mapping[str, Span]) -> dict[str, list[int]]:
    return {peer: [span.start, span.end] for peer, span in spans.items()}


def _text(span: Span | None) -> str:
    return "nothing" if span is None else f"{span.start}:{span.end}"
