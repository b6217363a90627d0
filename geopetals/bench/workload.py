"""What is asked, when and by whom: drawn once from a seed, so that every system is asked the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geopetals.bench.lengths import Length
from geopetals.bench.trace import TraceRow
from geopetals.errors import UnsupportedInput

_FIRST_TOKEN = 3  # below are padding, begin and end in most vocabularies


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt of token ids, and how many tokens are to be generated, neither more nor fewer.

    `arrival_s` counts from the start of the run; warm-up requests have None: they are asked before, one after another.
    """

    number: int
    host: str
    arrival_s: float | None
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests arrive. `rates` are requests per second of each host; infinite: all at once.

    Gaps of a host's arrivals are gamma distributed with the shape `burstiness`, as in vLLM: 1 is a Poisson process,
    infinite is a constant rate.
    """

    rates: dict[str, float]
    requests: int
    prompt_tokens: Length
    output_tokens: Length
    burstiness: float = 1.0
    warmups: int = 0

    def __post_init__(self) -> None:
        if not self.rates or any(not rate > 0 for rate in self.rates.values()):
            raise UnsupportedInput("each host needs a request rate above 0.")
        if not self.burstiness > 0:
            raise UnsupportedInput(f"burstiness is {self.burstiness}: 1 is Poisson, inf a constant rate.")


def draw(load: Load, *, vocabulary: int, seed: int) -> list[Request]:
    """The requests in order of arrival, the warm-up ones first. The same seed gives the same, on any machine."""
    arrivals = _arrivals(load, np.random.default_rng([seed, 0]))
    lengths = np.random.default_rng([seed, 1])
    sizes = [(load.prompt_tokens.draw(lengths), load.output_tokens.draw(lengths)) for _ in arrivals]
    return _with_warmups(load, arrivals, sizes, vocabulary=vocabulary, seed=seed)


def replay(load: Load, trace: Sequence[TraceRow], *, vocabulary: int, seed: int) -> list[Request]:
    """The requests of a trace, `load.requests` of them at most; hosts take them by chance, in proportion to rates."""
    rows = trace[: load.requests]
    shares = np.array(list(load.rates.values()))
    shares = shares / shares.sum() if np.isfinite(shares).all() else np.full(len(shares), 1 / len(shares))
    hosts = np.random.default_rng([seed, 0]).choice(list(load.rates), size=len(rows), p=shares)
    arrivals = [(row.arrival_s, str(host)) for row, host in zip(rows, hosts, strict=True)]
    sizes = [(row.prompt_tokens, row.output_tokens) for row in rows]
    return _with_warmups(load, arrivals, sizes, vocabulary=vocabulary, seed=seed)


def _arrivals(load: Load, rng: np.random.Generator) -> list[tuple[float, str]]:
    """(time, host), in order. The first requests of all hosts' processes together."""
    arrivals: list[tuple[float, str]] = []
    for host, rate in load.rates.items():
        if np.isinf(rate):
            gaps = np.zeros(load.requests)
        elif np.isinf(load.burstiness):
            gaps = np.full(load.requests, 1 / rate)
        else:
            gaps = rng.gamma(load.burstiness, 1 / (rate * load.burstiness), load.requests)
        arrivals += [(float(time_s), host) for time_s in np.cumsum(gaps)]
    return sorted(arrivals)[: load.requests]


def _with_warmups(
    load: Load,
    arrivals: Sequence[tuple[float, str]],
    sizes: Sequence[tuple[int, int]],
    *,
    vocabulary: int,
    seed: int,
) -> list[Request]:
    words = np.random.default_rng([seed, 2])
    planned: list[tuple[str, float | None, int, int]] = []
    for host in load.rates:
        planned += [(host, None, *sizes[index % len(sizes)]) for index in range(load.warmups)]
    planned += [(host, at, *size) for (at, host), size in zip(arrivals, sizes, strict=True)]
    return [
        Request(
            number=number,
            host=host,
            arrival_s=at,
            prompt=tuple(words.integers(_FIRST_TOKEN, vocabulary, prompt_tokens).tolist()),
            output_tokens=output_tokens,
        )
        for number, (host, at, prompt_tokens, output_tokens) in enumerate(planned)
    ]
