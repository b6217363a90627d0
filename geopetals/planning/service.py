"""What rate of arrivals a cluster sustains, for people to read."""

import math
from dataclasses import dataclass

from geopetals.cluster import Cluster, to_problem
from geopetals.planning.slo import Limits, Sustained, highest_rate
from geopetals.timing import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevel:
    """Limits, and the highest rate found that keeps them; None if none does."""

    cluster: Cluster
    limits: Limits
    found: Sustained | None


def service_level(
    cluster: Cluster, limits: Limits, *, objective: Objective, seed: int = 0, arrivals: int | None = None
) -> ServiceLevel:
    """Of the whole cluster, all clients together. arrivals: simulate that many at each rate that is tried.

    Raises ClusterError or UnsupportedInput.
    """
    problem, percentiles = to_problem(cluster), None
    if arrivals is not None:
        from geopetals.planning.slo_simulation import simulated_percentiles

        percentiles = simulated_percentiles(problem, objective, limits.percentile, sessions=arrivals, seed=seed)
    found = highest_rate(problem, limits, objective=objective, seed=seed, percentiles=percentiles)
    return ServiceLevel(cluster=cluster, limits=limits, found=found)


def service_json(service: ServiceLevel) -> dict[str, object]:
    """As JSON has it: seconds, sessions per second, spans as [start, end); a limit that is not set is null."""
    limits, found = service.limits, service.found
    report: dict[str, object] = {
        "percentile": limits.percentile,
        "ttft_limit_s": limits.ttft_s if math.isfinite(limits.ttft_s) else None,
        "tpot_limit_s": limits.tpot_s if math.isfinite(limits.tpot_s) else None,
        "rate_per_s": None,
    }
    if found is None:
        return report
    spans = [found.placement.span(index) for index in range(len(service.cluster.servers))]
    blocks = {
        server.id: None if span is None else {"start": span.start, "end": span.end}
        for server, span in zip(service.cluster.servers, spans, strict=True)
    }
    return report | {
        "rate_per_s": found.rate_per_s,
        "sessions": found.sessions,
        "ttft_s": found.ttft_s,
        "tpot_s": found.tpot_s,
        "blocks": blocks,
    }
