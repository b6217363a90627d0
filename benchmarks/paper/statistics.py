"""From rounds to rows: each cell's mean per method, intervals over the seeds, and what became of the paper's method.

Intervals are 95 %, by the bootstrap over seeds (percentiles of 4,000 resampled means, same seed everywhere).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from paper.cells import Cell
from paper.methods import METHODS, SETTINGS, Figures, Round

from geopetals.problem import Floats

GOAL = 0.2
"""By how much less time per token `geopetals` is to need where capacity is tight."""
WITHOUT_CONSTANTS = ("none", "compute", "compute, all batch")
_RESAMPLES = 4_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """Over seeds, with the interval in which it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Floats) -> "Mean":
        rng = np.random.default_rng(0)
        means = values[rng.integers(0, values.size, (_RESAMPLES, values.size))].mean(axis=1)
        low, high = np.percentile(means, (2.5, 97.5))
        return cls(value=float(values.mean()), low=float(low), high=float(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell under one setting. Per-token times in seconds."""

    cell: Cell
    setting: str
    per_token_s: dict[str, Mean]
    """By method, over the seeds in which all its sessions were served."""
    by_seed_s: dict[str, list[float]]
    first_s: dict[str, float]
    rest_s: dict[str, float]
    wait_s: dict[str, float]
    late_wait_s: dict[str, float]
    end_to_end_s: dict[str, float]
    refused: dict[str, int]
    """Sessions of all seeds."""
    against_paper: dict[str, Mean]
    """By method: per-token time less the paper's, of the same seed."""
    lone_s: float
    """Mean over seeds of the time per token below which no session comes."""
    design_sessions: float

    @property
    def saved(self) -> float:
        """The share of the paper's time per token that geopetals saves."""
        return -self.against_paper["geopetals"].value / self.per_token_s["paper"].value

    @property
    def most_saved(self) -> float:
        """No method saves more of the paper's time, by the bound."""
        return 1 - self.lone_s / self.per_token_s["paper"].value

    @property
    def tight(self) -> bool:
        """Load costs the paper's sessions so much that saving the goal's share is not ruled out by the bound."""
        return self.most_saved >= GOAL

    def efficiency(self, method: str) -> float:
        return self.lone_s / self.per_token_s[method].value


def rows_of(rounds: Sequence[Round]) -> list[Row]:
    cells = dict.fromkeys(each.cell for each in rounds)
    return [_row(cell, setting, [r for r in rounds if r.cell == cell]) for setting in SETTINGS for cell in cells]


def reason(row: Row) -> str:
    """Why geopetals does not save the goal's share of the paper's time."""
    ours, papers = row.wait_s["geopetals"], row.wait_s["paper"]
    service_s = row.end_to_end_s["geopetals"] - ours
    if not row.tight:
        return (
            f"not tight: no method could save more than {row.most_saved:.1%} of the paper's "
            f"{row.per_token_s['paper'].value:.3f} s, the bound being {row.lone_s:.3f} s"
        )
    if row.late_wait_s["geopetals"] > service_s / 2:
        return (
            f"overloaded: waits still grow when arrivals end (last fifth: {row.late_wait_s['geopetals']:.0f} s, a "
            f"session takes {service_s:.0f} s), and what counts is how many sessions fit, not how long a chain is; "
            f"waits fall from {papers:.0f} to {ours:.0f} s"
        )
    prefill_s = row.first_s["geopetals"] - ours
    if prefill_s > service_s / 3:
        return (
            f"prompts queue: computing its prompt among others takes {prefill_s:.0f} of a session's {service_s:.0f} s, "
            f"{row.first_s['paper'] - papers:.0f} s under the paper; waits for caches: {papers:.0f} to {ours:.0f} s"
        )
    return (
        f"per token after the first {row.rest_s['paper']:.3f} to {row.rest_s['geopetals']:.3f} s, "
        f"first token {row.first_s['paper']:.0f} to {row.first_s['geopetals']:.0f} s, "
        f"waits {papers:.0f} to {ours:.0f} s"
    )


def summary_of(rows: Sequence[Row]) -> dict[str, float]:
    """Flat figures. `lost`: cells in which geopetals' mean is above the paper's."""
    figures: dict[str, float] = {}
    for setting in SETTINGS:
        mine = [row for row in rows if row.setting == setting]
        tight = [row for row in mine if row.tight]
        name = setting.replace(", ", "_").replace(" ", "_")
        figures |= {
            f"{name}_cells": len(mine),
            f"{name}_lost": sum(row.saved < 0 for row in mine),
            f"{name}_clearly_lost": sum(row.against_paper["geopetals"].low > 0 for row in mine),
            f"{name}_saved_least": min(row.saved for row in mine),
            f"{name}_saved_median": float(np.median([row.saved for row in mine])),
            f"{name}_saved_most": max(row.saved for row in mine),
            f"{name}_tight": len(tight),
            f"{name}_tight_saved_goal": sum(row.saved >= GOAL for row in tight),
        }
        for method in METHODS:
            figures[f"{name}_{method.replace(', ', '_')}_efficiency_median"] = float(
                np.median([row.efficiency(method) for row in mine])
            )
    return figures


def as_json(row: Row) -> dict[str, object]:
    """As it stands in the results; times by seed rounded to 0.1 ms."""
    cell = row.cell
    return {
        "cell": cell.name,
        "network": cell.network,
        "question": cell.question,
        "setting": row.setting,
        "servers": cell.servers,
        "fast_servers": cell.fast_servers,
        "rate_per_s": cell.rate_per_s,
        "output_tokens": cell.output_tokens,
        "client": cell.client if cell.network == "clustered" else None,
        "design_sessions": round(row.design_sessions, 2),
        "bound_per_token_s": round(row.lone_s, 5),
        "saved_of_paper": round(row.saved, 5),
        "most_that_could_be_saved": round(row.most_saved, 5),
        "tight": row.tight,
        "why_not_more": None if row.saved >= GOAL else reason(row),
        "methods": {method: _method_json(row, method) for method in METHODS},
    }


def _method_json(row: Row, method: str) -> dict[str, object]:
    mean, paired = row.per_token_s[method], row.against_paper[method]
    return {
        "per_token_s": round(mean.value, 5),
        "per_token_s_interval": f"{mean.low:.5f} to {mean.high:.5f}",
        "less_paper_s": round(paired.value, 5),
        "less_paper_s_interval": f"{paired.low:.5f} to {paired.high:.5f}",
        "efficiency": round(row.efficiency(method), 5),
        "end_to_end_s": round(row.end_to_end_s[method], 3),
        "first_s": round(row.first_s[method], 4),
        "rest_s": round(row.rest_s[method], 5),
        "wait_s": round(row.wait_s[method], 3),
        "refused": row.refused[method],
        "per_token_s_by_seed": " ".join(f"{value:.4f}" for value in row.by_seed_s[method]),
    }


def _row(cell: Cell, setting: str, rounds: Sequence[Round]) -> Row:
    of: dict[str, list[Figures]] = {method: [r.figures[setting][method] for r in rounds] for method in METHODS}
    times = {method: np.array([f.per_token_s if not f.refused else np.nan for f in of[method]]) for method in METHODS}

    def mean(field: str) -> dict[str, float]:
        return {method: _mean([getattr(f, field) for f in of[method]], times[method]) for method in METHODS}

    per_token_s = {method: _interval(times[method]) for method in METHODS}
    return Row(
        cell=cell,
        setting=setting,
        per_token_s=per_token_s,
        by_seed_s={method: times[method].tolist() for method in METHODS},
        first_s=mean("first_s"),
        rest_s=mean("rest_s"),
        wait_s=mean("wait_s"),
        late_wait_s=mean("late_wait_s"),
        end_to_end_s={method: per_token_s[method].value * cell.output_tokens for method in METHODS},
        refused={method: sum(f.refused for f in of[method]) for method in METHODS},
        against_paper={method: _interval(times[method] - times["paper"]) for method in METHODS},
        lone_s=float(np.mean([r.lone_s[setting] for r in rounds])),
        design_sessions=float(np.mean([r.design_sessions for r in rounds])),
    )


def _mean(values: Sequence[float], times: Floats) -> float:
    kept = np.array(values)[~np.isnan(times)]
    return float(kept.mean()) if kept.size else float("nan")


def _interval(values: Floats) -> Mean:
    kept = values[~np.isnan(values)]
    return Mean.of(kept) if kept.size else Mean(value=float("nan"), low=float("nan"), high=float("nan"))
