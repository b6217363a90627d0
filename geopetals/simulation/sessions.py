"""The sessions that come, drawn from a scenario: the same for every policy, given the seed."""

from dataclasses import dataclass

import numpy as np

from geopetals.errors import UnsupportedInput
from geopetals.problem import Floats, Ints
from geopetals.simulation.lengths import Lengths
from geopetals.simulation.scenario import Load
from geopetals.simulation.trace import Trace
from geopetals.simulation.world import World


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sessions:
    """(N,) each, in the order of arrival. Lengths are None where all are those of the problem."""

    client: Ints
    arrival_s: Floats
    prompt_tokens: Ints | None = None
    output_tokens: Ints | None = None

    def __len__(self) -> int:
        return self.arrival_s.size


def draw_sessions(load: Load, world: World, seed: int) -> Sessions:
    """Independent streams of random numbers for times, clients and lengths, so that changing one leaves the others."""
    times, clients, prompts, outputs = (np.random.default_rng([seed, stream]) for stream in range(4))
    arrival_s = _arrivals(load, float(world.problem.demand_per_s.sum()), times)
    count = arrival_s.size
    if not count:
        raise UnsupportedInput("Nobody comes within the workload's duration: make it longer, or raise the rate.")
    share = world.problem.demand_per_s / max(float(world.problem.demand_per_s.sum()), 1e-300)
    if not share.any():
        share = np.full(world.problem.num_clients, 1 / world.problem.num_clients)
    lengths: tuple[Ints | None, Ints | None] = (None, None)
    if load.prompt is not None or load.output is not None:
        tokens, trace = world.required_tokens(), load.trace
        rows = None if trace is None else _rows(load, trace, count, prompts)
        of_trace = (None, None) if trace is None else (trace.prompt_tokens[rows], trace.output_tokens[rows])
        lengths = (
            _lengths(load.prompt, tokens.prompt, of_trace[0], prompts, count),
            _lengths(load.output, tokens.output, of_trace[1], outputs, count),
        )
    return Sessions(
        client=clients.choice(share.size, count, p=share),
        arrival_s=arrival_s,
        prompt_tokens=lengths[0],
        output_tokens=lengths[1],
    )


def _arrivals(load: Load, demand_per_s: float, rng: np.random.Generator) -> Floats:
    if load.arrivals.kind == "trace" and load.trace is not None:
        return _of_trace(load, load.trace)
    rate_per_s = load.arrivals.rate_per_s or demand_per_s
    if not rate_per_s > 0:
        raise UnsupportedInput("Nobody asks anything: give workload.arrivals a rate above 0.")
    if load.arrivals.kind == "constant":
        count = load.sessions or int((load.duration_s or 0.0) * rate_per_s)
        return np.arange(1, count + 1) / rate_per_s
    if load.sessions is not None:
        return np.cumsum(rng.exponential(1 / rate_per_s, load.sessions))
    duration_s, times = load.duration_s or 0.0, np.zeros(0)
    while not times.size or times[-1] < duration_s:
        more = np.cumsum(rng.exponential(1 / rate_per_s, 1000))
        times = np.concatenate([times, more + (times[-1] if times.size else 0.0)])
    return times[times < duration_s]


def _of_trace(load: Load, trace: Trace) -> Floats:
    times = trace.arrival_s
    if load.arrivals.rate_per_s is not None and len(trace) > 1:
        times = times * ((len(trace) - 1) / load.arrivals.rate_per_s / max(float(times[-1]), 1e-9))
    return times[: load.sessions] if load.sessions is not None else times[times < (load.duration_s or 0.0)]


def _rows(load: Load, trace: Trace, count: int, rng: np.random.Generator) -> Ints:
    """Which request of the trace each session is: its own, or, with other times, any."""
    return np.arange(count) if load.arrivals.kind == "trace" else rng.integers(0, len(trace), count)


def _lengths(lengths: Lengths | None, usual: int, of_trace: Ints | None, rng: np.random.Generator, count: int) -> Ints:
    if lengths is None:
        return np.full(count, usual, dtype=np.int64)
    if lengths.kind == "trace" and of_trace is not None:
        return of_trace
    return lengths.draw(rng, count)
