"""Several policies on the same sessions, over several seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from geopetals.errors import MemoryShortage
from geopetals.simulation.runs import Subject, simulate
from geopetals.simulation.scenario import Scenario


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """A policy. Its figures are means over the seeds of each seed's figure."""

    policy: str
    runs: tuple[dict[str, float], ...]
    """Of each seed."""
    figures: dict[str, float]
    failed: str | None = None
    """Why it cannot serve the cluster at all."""
    ttft_s: tuple[float, ...] = ()
    """Of all measured sessions of all seeds, in ascending order."""
    tpot_s: tuple[float, ...] = ()


def compare(
    subject: Subject,
    scenario: Scenario,
    policies: Sequence[str],
    *,
    seeds: Sequence[int],
    advance: Callable[[str, int], None] | None = None,
) -> tuple[Row, ...]:
    """The same sessions for each policy. advance: told the policy and how many more sessions arrived.

    A policy whose placement does not fit has a row that says why; other errors are raised.
    """
    return tuple(_row(subject, scenario, name, seeds, advance) for name in policies)


def _row(
    subject: Subject,
    scenario: Scenario,
    name: str,
    seeds: Sequence[int],
    advance: Callable[[str, int], None] | None,
) -> Row:
    def tell(arrived: int) -> None:
        if advance is not None:
            advance(name, arrived)

    try:
        results = [simulate(subject, scenario, name, seed, advance=tell) for seed in seeds]
    except MemoryShortage as error:
        return Row(policy=name, runs=(), figures={}, failed=str(error))
    runs = tuple(result.summary() for result in results)
    return Row(
        policy=name,
        runs=runs,
        figures={key: _mean([run[key] for run in runs]) for key in runs[0]},
        ttft_s=_together([result.ttft_s() for result in results]),
        tpot_s=_together([result.tpot_s() for result in results]),
    )


def _mean(values: list[float]) -> float:
    """nan only if nothing was measured in any run."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _together(values_s: "list[np.ndarray[tuple[int], np.dtype[np.float64]]]") -> tuple[float, ...]:
    return tuple(np.sort(np.concatenate(values_s)).tolist())


def json_of(rows: Sequence[Row], scenario: Scenario, seeds: Sequence[int]) -> dict[str, object]:
    """In seconds; null where nothing was measured."""
    return {
        "scenario": scenario.name,
        "cluster": None if scenario.cluster is None else scenario.cluster.name,
        "mode": scenario.mode,
        "seeds": list(seeds),
        "policies": [
            {
                "policy": row.policy,
                "failed": row.failed,
                "figures": _known(row.figures),
                "runs": [_known(run) for run in row.runs],
            }
            for row in rows
        ],
    }


def _known(figures: dict[str, float]) -> dict[str, float | None]:
    return {key: None if np.isnan(value) else value for key, value in figures.items()}
