"""How long round trips between members take: medians of recent samples, and estimates with their error elsewhere.

What decisions go by changes only when a link has changed noticeably: small noise must not make new prices all the time.

An unmeasured pair is estimated from servers that both have measured, by the triangle inequality: the round trip lies
between the largest difference and the smallest sum of the two known ones. The estimate is the middle, its error half
the distance. (Internet paths break the inequality now and then: the error is no bound.)
"""

from collections.abc import Container, Iterable, Sequence
from statistics import median
from typing import Any

import numpy as np

from geopetals.coordinator.core.settings import Settings
from geopetals.coordinator.messages import RateSample
from geopetals.problem import Floats, Ints

_KEPT = 3
"""Samples of a link, whose median counts: members send medians themselves, and a slow link has to show in seconds."""
_LEAST_S, _MOST_S = 1e-6, 60.0
_MOST_BYTES_PER_S = 1e12

Pair = tuple[str, str]


class Links:
    """Pairs are unordered: a round trip takes as long from either end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._samples: dict[Pair, list[tuple[float, float]]] = {}
        self.relayed: dict[Pair, bool] = {}
        self.in_force: dict[Pair, float] = {}
        """What decisions go by."""
        self.rates: dict[str, dict[str, float]] = {}
        """Of each server, by sender: bytes a second in the large messages that came lately. For people: plans know a
        line of each machine, and what came from one sender says too little about that.
        """
        self.partners: dict[str, set[str]] = {}
        """Of each member those between whom and it something was measured."""
        self._touched: set[Pair] = set()

    def add(self, one: str, other: str, rtt_s: float, now: float, *, relayed: bool) -> None:
        if one == other:
            return
        pair = pair_of(one, other)
        samples = self._samples.get(pair)
        if samples is None:
            samples = self._samples[pair] = []
            self._met(pair)
        samples.append((now, min(max(rtt_s, _LEAST_S), _MOST_S)))
        del samples[:-_KEPT]
        self.relayed[pair] = relayed
        self._touched.add(pair)

    def measured_s(self, one: str, other: str) -> float | None:
        """The median of the recent samples."""
        samples = self._samples.get(pair_of(one, other))
        if not samples:
            return None
        return median([rtt_s for _, rtt_s in samples])

    def measured_at(self, one: str, other: str) -> float:
        """When the last sample was taken; -inf: never."""
        samples = self._samples.get(pair_of(one, other))
        return samples[-1][0] if samples else -float("inf")

    @property
    def touched(self) -> bool:
        """Whether there is anything to take into account."""
        return bool(self._touched)

    def take(self, servers: Container[str]) -> tuple[bool, float]:
        """Bring what has changed noticeably into force. Gives whether anything has, and the largest relative change
        between servers; inf: a new link.
        """
        largest, any_change = 0.0, False
        for pair in sorted(self._touched):
            found_s, used_s = self.measured_s(*pair), self.in_force.get(pair)
            if found_s is None:
                continue
            if used_s is not None:
                change_s = abs(found_s - used_s)
                if change_s <= max(self._settings.link_change_s, self._settings.link_change * used_s):
                    continue
            else:
                change_s = float("inf")
            any_change = True
            if pair[0] in servers and pair[1] in servers:
                largest = max(largest, change_s / min(used_s or found_s, found_s))
            self.in_force[pair] = found_s
        self._touched.clear()
        return any_change, largest

    def came(self, receiver: str, rates: Iterable[RateSample]) -> None:
        """What a server says of now."""
        self.rates[receiver] = {rate.peer_id: min(rate.bytes_per_s, _MOST_BYTES_PER_S) for rate in rates}
        if not self.rates[receiver]:
            del self.rates[receiver]

    def forget(self, member: str) -> None:
        """The member is gone for good."""
        self.rates.pop(member, None)
        for pair in [pair_of(member, other) for other in sorted(self.partners.get(member, ()))]:
            del self._samples[pair]
            for end, other in (pair, pair[::-1]):
                self.partners[end].discard(other)
            self.relayed.pop(pair, None)
            self.in_force.pop(pair, None)
            self._touched.discard(pair)
        self.partners.pop(member, None)

    def matrix(self, clients: Sequence[str], servers: Sequence[str]) -> tuple[Floats, Floats]:
        """(C + J, J), clients first, to servers: round trips in force or estimated, and the errors of estimates.

        An error of 0: measured. There is nothing between clients, of which there may be thousands.
        """
        first = len(clients)
        known = self._known([*clients, *servers], servers)
        rtts, errors = known.copy(), np.zeros_like(known)
        for row in range(len(known)):
            # Between servers only what follows in their order, so that this order alone decides.
            start = max(row + 1 - first, 0)
            missing = start + np.flatnonzero(np.isnan(known[row, start:]))
            if missing.size:
                rtts[row, missing], errors[row, missing] = _estimated(known, row, first, missing)
        default_s = self.typical_s()
        unknown = np.isnan(rtts)
        rtts[unknown], errors[unknown] = default_s, default_s
        for matrix in (rtts, errors):
            upper = np.triu(matrix[first:], 1)
            matrix[first:] = upper + upper.T
        return rtts, errors

    def typical_s(self) -> float:
        """Of links of which nothing is known."""
        return median(self.in_force.values()) if self.in_force else self._settings.default_rtt_s

    def to_dict(self) -> dict[str, Any]:
        return {
            "samples": [[*pair, [list(sample) for sample in kept]] for pair, kept in self._samples.items()],
            "relayed": [[*pair, relayed] for pair, relayed in self.relayed.items()],
            "in_force": [[*pair, rtt_s] for pair, rtt_s in self.in_force.items()],
            "touched": [list(pair) for pair in sorted(self._touched)],
            "rates": self.rates,
        }

    def restore(self, raw: dict[str, Any]) -> None:
        self._samples = {(one, other): [(at, rtt) for at, rtt in kept] for one, other, kept in raw["samples"]}
        for pair in self._samples:
            self._met(pair)
        self.relayed = {(one, other): relayed for one, other, relayed in raw["relayed"]}
        self.in_force = {(one, other): rtt_s for one, other, rtt_s in raw["in_force"]}
        self._touched = {(one, other) for one, other in raw["touched"]}
        self.rates = {receiver: dict(rates) for receiver, rates in raw.get("rates", {}).items()}

    def _met(self, pair: Pair) -> None:
        for one, other in (pair, pair[::-1]):
            self.partners.setdefault(one, set()).add(other)

    def _known(self, members: Sequence[str], servers: Sequence[str]) -> Floats:
        """(C + J, J). NaN where nothing is known, also from a server to itself."""
        row = {member: index for index, member in enumerate(members)}
        column = {server: index for index, server in enumerate(servers)}
        known = np.full((len(members), len(servers)), np.nan)
        for pair, rtt_s in self.in_force.items():
            for one, other in (pair, pair[::-1]):
                here, there = row.get(one), column.get(other)
                if here is not None and there is not None:
                    known[here, there] = rtt_s
        return known


def pair_of(one: str, other: str) -> Pair:
    return (one, other) if one < other else (other, one)


def _estimated(known: Floats, row: int, first: int, missing: Ints) -> tuple[Floats, Floats]:
    """Of these columns of the row; NaN where no server is known from both ends. Servers' rows begin with `first`."""
    landmarks = np.flatnonzero(~np.isnan(known[row]))
    if not landmarks.size:
        nothing = np.full(missing.size, np.nan)
        return nothing, nothing
    here, there = known[row, landmarks, None], known[np.ix_(first + landmarks, missing)]
    upper = np.fmin.reduce(here + there, axis=0)
    lower = np.fmax.reduce(np.abs(here - there), axis=0)
    return (upper + lower) / 2, (upper - lower) / 2
