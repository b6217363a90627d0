"""How many sessions come from whom, how large they are, and how their predicted durations have to be corrected.

All by exponentially fading sums. Where little was seen yet, the settings' defaults weigh in.
"""

import math
from typing import Any

from geopetals.coordinator.core.settings import Settings

_BELIEF_S = 60.0
"""The default rate counts as if it had been observed for so long."""
_BELIEF_SESSIONS = 10.0
"""The default size counts as so many sessions."""
_CLIENT_SESSIONS = 4.0
"""So many sessions of a client weigh as much as what is known of all others."""
_LEARNING = 0.2
_LEAST_RATIO, _MOST_RATIO = 0.05, 20.0
_GRAIN = 8
"""Mean sizes are rounded to so many tokens, since every change of them changes all plans."""


class Demand:
    """Times on the caller's clock, in seconds."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._began_s: float | None = None
        self._arrivals: dict[str, tuple[float, float]] = {}
        """Of each client: its fading count, and at which instant it had that value."""
        self._prompt = [settings.prompt_tokens * _BELIEF_SESSIONS, _BELIEF_SESSIONS]
        self._output = [settings.output_tokens * _BELIEF_SESSIONS, _BELIEF_SESSIONS]
        """Fading sum of tokens and of sessions."""
        self._speed: dict[str, tuple[float, float]] = {}
        """Of each client, "" is all: the mean logarithm of measured over predicted duration, and its weight."""
        self._length: dict[str, tuple[float, float]] = {}
        """The same for tokens generated over tokens expected."""

    def arrived(self, client: str, prompt: int, output: int, now: float) -> None:
        """A session that was asked for: `output` tokens are expected."""
        if self._began_s is None:
            self._began_s = now
        self._arrivals[client] = (self._count(client, now) + 1.0, now)
        for sums, tokens in ((self._prompt, prompt), (self._output, output)):
            sums[0], sums[1] = sums[0] * 0.98 + tokens, sums[1] * 0.98 + 1.0

    def ended(self, client: str, *, predicted_s: float, took_s: float, expected_tokens: int, tokens: int) -> None:
        """predicted_s: for the tokens that it really had."""
        if predicted_s > 0 and took_s > 0:
            _learn(self._speed, client, took_s / predicted_s)
        if expected_tokens > 0 and tokens > 0:
            _learn(self._length, client, tokens / expected_tokens)

    def speed(self, client: str) -> float:
        """By how much longer its sessions last than is predicted for their tokens."""
        return _ratio(self._speed, client)

    def length(self, client: str) -> float:
        """Share of the expected tokens that its sessions generate."""
        return min(_ratio(self._length, client), 1.0)

    def rate_per_s(self, now: float) -> float:
        """Of all clients."""
        window_s, default = self._settings.demand_window_s, self._settings.arrivals_per_s
        if self._began_s is None:
            return default
        seen_s = window_s * -math.expm1(-max(now - self._began_s, 0.0) / window_s)
        counted = math.fsum(self._count(client, now) for client in sorted(self._arrivals))
        return max((counted + default * _BELIEF_S) / (seen_s + _BELIEF_S), default / 10)

    def shares(self, now: float, most: int) -> dict[str, float]:
        """Of the clients that ask most often; they sum up to 1. Empty if nobody has asked."""
        counts = {client: self._count(client, now) for client in sorted(self._arrivals)}
        kept = sorted(counts, key=lambda client: -counts[client])[:most]
        total = math.fsum(counts[client] for client in kept)
        return {client: counts[client] / total for client in kept if counts[client] > 1e-3 * total} if total else {}

    def tokens(self) -> tuple[int, int]:
        """Of a mean session: prompt and output."""
        return _grained(self._prompt), _grained(self._output)

    def clients(self) -> list[str]:
        """Of which something is known."""
        return [client for client in {**self._arrivals, **self._speed, **self._length} if client]

    def forget(self, client: str, now: float) -> None:
        """A client that has not asked for long."""
        if self._count(client, now) < 0.01:
            for kept in (self._arrivals, self._speed, self._length):
                kept.pop(client, None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "began_s": self._began_s,
            "arrivals": {client: list(pair) for client, pair in self._arrivals.items()},
            "prompt": list(self._prompt),
            "output": list(self._output),
            "speed": {client: list(pair) for client, pair in self._speed.items()},
            "length": {client: list(pair) for client, pair in self._length.items()},
        }

    def restore(self, raw: dict[str, Any]) -> None:
        self._began_s = raw["began_s"]
        self._prompt, self._output = list(raw["prompt"]), list(raw["output"])
        self._arrivals = {client: (count, at) for client, (count, at) in raw["arrivals"].items()}
        self._speed = {client: (mean, weight) for client, (mean, weight) in raw["speed"].items()}
        self._length = {client: (mean, weight) for client, (mean, weight) in raw["length"].items()}

    def _count(self, client: str, now: float) -> float:
        count, at_s = self._arrivals.get(client, (0.0, now))
        return count * math.exp(-max(now - at_s, 0.0) / self._settings.demand_window_s)


def _learn(kept: dict[str, tuple[float, float]], client: str, ratio: float) -> None:
    logarithm = math.log(min(max(ratio, _LEAST_RATIO), _MOST_RATIO))
    for key in ("", client):
        mean, weight = kept.get(key, (0.0, 0.0))
        # The first ones count in full, later ones fade.
        share = max(_LEARNING, 1.0 / (weight + 1.0))
        kept[key] = (mean + share * (logarithm - mean), weight + 1.0)


def _ratio(kept: dict[str, tuple[float, float]], client: str) -> float:
    everybody, _ = kept.get("", (0.0, 0.0))
    own, weight = kept.get(client, (0.0, 0.0))
    share = weight / (weight + _CLIENT_SESSIONS)
    return math.exp(share * own + (1 - share) * everybody)


def _grained(sums: list[float]) -> int:
    return max(round(sums[0] / sums[1] / _GRAIN) * _GRAIN, 1)
