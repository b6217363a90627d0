"""What became of every session, and the figures that people compare."""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from geopetals.plan import Chain, Placement
from geopetals.problem import Floats, Ints

_PERCENTILES = (50, 90, 99)


class Fate(IntEnum):
    """Of a session, when the clock stops."""

    IN_PROGRESS = 0
    """Waiting or running."""
    COMPLETED = 1
    REFUSED = 2
    """No chain, or too long a wait, before its first start."""
    FAILED = 3
    """It ran, lost a server, and found no other chain."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Log:
    """(N,) each, in the order of arrival, in seconds; nan where it did not happen."""

    client: Ints
    arrival_s: Floats
    start_s: Floats
    """When it first held its caches, constants not included."""
    first_s: Floats
    """Its first token."""
    end_s: Floats
    """Its last token."""
    wait_s: Floats
    """From arrival to start."""
    cost_s: Floats
    """What its router minimised."""
    prompt_tokens: Ints
    output_tokens: Ints
    fate: Ints
    failovers: Ints
    replayed_tokens: Ints
    chains: list[Chain | None]
    """The last that each had."""

    @classmethod
    def empty(cls, client: Ints, arrival_s: Floats, prompt_tokens: Ints, output_tokens: Ints) -> "Log":
        count = arrival_s.size
        start_s, first_s, end_s, wait_s, cost_s = np.full((5, count), np.nan)
        fate, failovers, replayed_tokens = np.zeros((3, count), dtype=np.int64)
        return cls(
            client=client,
            arrival_s=arrival_s,
            start_s=start_s,
            first_s=first_s,
            end_s=end_s,
            wait_s=wait_s,
            cost_s=cost_s,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            fate=fate,
            failovers=failovers,
            replayed_tokens=replayed_tokens,
            chains=[None] * count,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """One policy, one seed. Sessions before `warm_up` count in nothing but `log`."""

    policy: str
    seed: int
    log: Log
    placement: Placement
    """At the beginning."""
    warm_up: int
    until_s: float
    """When the clock stopped."""
    interval_s: Floats
    """Durations between tokens of measured sessions; with contention the middle of classes 1 % wide."""
    interval_weight: Floats
    """How many there were of each."""
    memory_use: Floats
    """(J,): share of the cache that was held, the mean from the end of the warm-up to the last arrival; nan without
    blocks."""
    compute_use: Floats
    """(J,): share of that time at work. Without contention servers compute for all at once: it may be above 1."""
    max_concurrent: int = 0
    """Sessions admitted, waiting ones too."""
    counted: dict[str, int] = field(default_factory=dict)
    """Sessions by fate, all of them."""

    @property
    def measured(self) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """(N,): completed, and not in the warm-up."""
        completed = self.log.fate == Fate.COMPLETED
        completed[: self.warm_up] = False
        return np.asarray(completed)

    @property
    def window_s(self) -> tuple[float, float]:
        """From the first measured arrival to the last arrival, or the end of the clock: what use refers to."""
        arrivals = self.log.arrival_s
        return float(arrivals[min(self.warm_up, arrivals.size - 1)]), min(float(arrivals[-1]), self.until_s)

    def ttft_s(self) -> Floats:
        """Of measured sessions: from arrival to the first token."""
        return np.asarray((self.log.first_s - self.log.arrival_s)[self.measured])

    def tpot_s(self) -> Floats:
        """Of measured sessions with two tokens or more: from the first token to the last, per token after the first."""
        log, several = self.log, self.measured & (self.log.output_tokens > 1)
        return np.asarray(((log.end_s - log.first_s) / np.maximum(log.output_tokens - 1, 1))[several])

    def end_to_end_s(self) -> Floats:
        """Of measured sessions: from arrival to the last token."""
        return np.asarray((self.log.end_s - self.log.arrival_s)[self.measured])

    def per_token_s(self) -> Floats:
        """Of measured sessions: end to end over all tokens, the paper's figure."""
        return np.asarray(self.end_to_end_s() / self.log.output_tokens[self.measured])

    def summary(self) -> dict[str, float]:
        """Flat: means and percentiles in seconds, rates per second, counts. nan where nothing was measured.

        Rates are those of measured sessions from the first of their arrivals to the last of their tokens, the time in
        which they empty the swarm included.
        """
        measured = self.measured
        served_s = float(self.log.end_s[measured].max(initial=0.0)) - self.window_s[0]
        length_s = max(served_s, 1e-12)
        after, held = slice(self.warm_up, None), self.memory_use[~np.isnan(self.memory_use)]
        figures = {
            **_spread("ttft", self.ttft_s()),
            **_spread("tpot", self.tpot_s()),
            **_weighted_spread("itl", self.interval_s, self.interval_weight),
            **_spread("wait", np.asarray(self.log.wait_s[self.measured])),
            **_spread("e2e", self.end_to_end_s()),
            **_spread("per_token", self.per_token_s()),
            "sessions_per_s": float(measured.sum()) / length_s,
            "tokens_per_s": float(self.log.output_tokens[measured].sum()) / length_s,
            "memory_use": float(held.mean()) if held.size else 0.0,
            "memory_use_max": float(held.max(initial=0.0)),
            "compute_use": float(np.mean(self.compute_use)),
            "compute_use_max": float(np.max(self.compute_use)),
            "measured": float(self.measured.sum()),
            "failed_over": float((self.log.failovers[after] > 0).sum()),
            "replayed_tokens": float(self.log.replayed_tokens[after].sum()),
            "max_concurrent": float(self.max_concurrent),
        }
        for fate in Fate:
            figures[fate.name.lower()] = float((self.log.fate[after] == fate).sum())
        return figures


def _spread(name: str, values_s: Floats) -> dict[str, float]:
    if not values_s.size:
        return {f"{name}_{which}_s": float("nan") for which in ("mean", *(f"p{q}" for q in _PERCENTILES))}
    percentiles = np.percentile(values_s, _PERCENTILES)
    shown = {f"{name}_p{q}_s": float(value) for q, value in zip(_PERCENTILES, percentiles, strict=True)}
    return {f"{name}_mean_s": float(values_s.mean()), **shown}


def _weighted_spread(name: str, values_s: Floats, weights: Floats) -> dict[str, float]:
    used = weights > 0
    if not used.any():
        return _spread(name, np.zeros(0))
    order = np.argsort(values_s[used], kind="stable")
    ascending, total = values_s[used][order], np.cumsum(weights[used][order])
    places = np.searchsorted(total, np.array(_PERCENTILES) / 100 * total[-1] * (1 - 1e-12))
    shown = {f"{name}_p{q}_s": float(ascending[place]) for q, place in zip(_PERCENTILES, places, strict=True)}
    return {f"{name}_mean_s": float(np.average(values_s[used], weights=weights[used])), **shown}
