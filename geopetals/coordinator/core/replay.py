"""A recorded log through the simulator: the same decisions, or where they differ.

The log is what whoever drives the core writes down: each event with its instant and the actions that followed. Replay
feeds the events to a new core from an agenda in simulated time, as the simulator feeds arrivals to a policy.
What the log says of arrivals, lengths and outages can be simulated under other policies, too: see `trace`.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from geopetals.coordinator.core import events as ev
from geopetals.coordinator.core.actions import action_to_dict
from geopetals.coordinator.core.core import Core


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """An entry of the log. Events and actions as event_to_dict and action_to_dict write them."""

    at_s: float
    event: dict[str, Any]
    actions: tuple[dict[str, Any], ...] | None = None
    """None: they were not written down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first decisions that are not the recorded ones."""

    number: int
    at_s: float
    event: dict[str, Any]
    recorded: tuple[dict[str, Any], ...]
    replayed: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a replay came to."""

    decisions: tuple[tuple[float, tuple[dict[str, Any], ...]], ...]
    """The actions after each event, and when."""
    differences: tuple[Difference, ...]


def replay(core: Core, log: Iterable[Recorded], *, most_differences: int = 10) -> Replayed:
    """Through a new core, or one restored from the snapshot before the log, of the same model, settings and seed.

    Raises MessageError for what is no event.
    """
    agenda = [(entry.at_s, number, entry) for number, entry in enumerate(log)]
    heapq.heapify(agenda)
    decisions: list[tuple[float, tuple[dict[str, Any], ...]]] = []
    differences: list[Difference] = []
    while agenda:
        now, number, entry = heapq.heappop(agenda)
        found = tuple(action_to_dict(action) for action in core.apply(ev.event_from_dict(entry.event), now))
        decisions.append((now, found))
        if entry.actions is not None and entry.actions != found and len(differences) < most_differences:
            differences.append(
                Difference(number=number, at_s=now, event=entry.event, recorded=entry.actions, replayed=found)
            )
    return Replayed(decisions=tuple(decisions), differences=tuple(differences))


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
