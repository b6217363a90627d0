"""A recorded log through the simulator: the same decisions, or where they differ.

The log is what whoever drives the core writes down: each event with its instant and the actions that followed. The
simulator's timeline lets them happen again, to a new core, as it lets sessions arrive and servers fail for a policy.
What the log says of arrivals, lengths and outages can be simulated under other policies, too: see `trace`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from geopetals.coordinator.core import events as ev
from geopetals.coordinator.core.actions import action_to_dict
from geopetals.coordinator.core.core import Core
from geopetals.coordinator.core.planner import make_plan
from geopetals.coordinator.core.plans import Plans
from geopetals.coordinator.core.subject import PlanJob
from geopetals.simulation.timeline import Source, Timeline

Decisions = tuple[dict[str, Any], ...]
Make = Callable[[PlanJob], Plans]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """An entry of the log. Events and actions as event_to_dict and action_to_dict write them."""

    at_s: float
    event: dict[str, Any]
    actions: Decisions | None = None
    """None: they were not written down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first decisions that are not the recorded ones."""

    number: int
    at_s: float
    event: dict[str, Any]
    recorded: Decisions
    replayed: Decisions


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a replay came to."""

    decisions: tuple[tuple[float, Decisions], ...]
    """The actions after each event, and when."""
    differences: tuple[Difference, ...]


class Replay:
    """What the log says happens, as a source of the simulator's timeline."""

    def __init__(self, core: Core, log: Iterable[Recorded], *, make: Make | None, most_differences: int) -> None:
        self._core, self._log, self._make, self._most = core, iter(log), make, most_differences
        self._timeline = Timeline(Source(self._next_s, self._happen))
        self._number = 0
        self._next = next(self._log, None)
        self._decisions: list[tuple[float, Decisions]] = []
        self._differences: list[Difference] = []

    def run(self) -> Replayed:
        while self._timeline.advance():
            pass
        return Replayed(decisions=tuple(self._decisions), differences=tuple(self._differences))

    def _next_s(self) -> float:
        return float("inf") if self._next is None else self._next.at_s

    def _happen(self) -> None:
        entry = self._next
        assert entry is not None, "what happens has been recorded"
        event, now = ev.event_from_dict(entry.event), self._timeline.now
        if isinstance(event, ev.PlanMade):
            self._plan_again(event, entry)
        found = tuple(action_to_dict(action) for action in self._core.apply(event, now))
        self._decisions.append((now, found))
        if entry.actions is not None:
            self._compare(entry, entry.actions, found)
        self._next = next(self._log, None)
        self._number += 1

    def _plan_again(self, event: ev.PlanMade, entry: Recorded) -> None:
        """What is placed where is decided outside of the core: of the same swarm the same plan has to come."""
        job = self._core.plan_job(event.plans.number)
        if self._make is not None and job is not None:
            self._compare(entry, (event.plans.to_dict(),), (self._make(job).to_dict(),))

    def _compare(self, entry: Recorded, recorded: Decisions, replayed: Decisions) -> None:
        if recorded != replayed and len(self._differences) < self._most:
            self._differences.append(
                Difference(
                    number=self._number, at_s=entry.at_s, event=entry.event, recorded=recorded, replayed=replayed
                )
            )


def replay(
    core: Core, log: Iterable[Recorded], *, make: Make | None = make_plan, most_differences: int = 10
) -> Replayed:
    """Through a new core, or one restored from the snapshot before the log, of the same model, settings and seed.

    make: makes the plans once more that were made then; None: takes them as they were. Raises MessageError for what is
    no event.
    """
    return Replay(core, log, make=make, most_differences=most_differences).run()


def trace(log: Sequence[Recorded]) -> list[tuple[float, str, int, int]]:
    """Arrivals as the simulator's traces have them: seconds since the first, client, prompt and output tokens."""
    asked = [(entry.at_s, entry.event) for entry in log if entry.event.get("kind") == "SessionAsked"]
    found = []
    for at_s, raw in sorted(asked, key=lambda pair: pair[0]):
        event = ev.SessionAsked.from_dict(raw)
        prompt = max(min(event.open.prompt_tokens, event.open.max_length - 1), 1)
        output = event.open.output_tokens or max(event.open.max_length - prompt, 1)
        found.append((at_s - asked[0][0], event.client, prompt, output))
    return found
