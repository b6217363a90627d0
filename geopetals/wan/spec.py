"""An emulated network as data: hosts, and how each reaches each other one."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import permutations
from typing import Any, Self

from geopetals.wan.errors import WanError

MOST_HOSTS = 250
ALL = "all"
_LONGEST_S = 600.0


class Nat(StrEnum):
    """How a host's NAT chooses the port that others see. Both kinds let in only answers of the peer written to.

    PORT_PRESERVING keeps the host's own port whoever the peer is, so that a peer can learn it from others and punch a
    hole. SYMMETRIC takes a new random port for each peer: nobody can learn it beforehand.
    """

    PORT_PRESERVING = "port-preserving"
    SYMMETRIC = "symmetric"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """A machine and its access line, in bits per second; None never limits."""

    name: str
    up_bit_per_s: float | None = None
    down_bit_per_s: float | None = None
    nat: Nat | None = None

    def __post_init__(self) -> None:
        if not self.name.isprintable() or not 0 < len(self.name.strip()) == len(self.name) <= 100:
            raise WanError(f"{self.name[:60]!r} is no name of a host: write up to 100 letters, no space at either end.")
        if self.name == ALL or ">" in self.name or self.name.startswith("-"):
            raise WanError(
                f"a host may not be called {self.name!r}: 'all', '>' and a '-' in front have a meaning here."
            )
        _check_rate(f"up of {self.name}", self.up_bit_per_s)
        _check_rate(f"down of {self.name}", self.down_bit_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One direction of a pair of hosts.

    A packet takes half of `rtt_s`, then a random time of mean `jitter_s`, exponentially distributed, without overtaking
    others of its direction; it is lost with probability `loss`. `rtt_s` is infinite where there is no link.
    """

    rtt_s: float
    bandwidth_bit_per_s: float | None = None
    jitter_s: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.rtt_s <= _LONGEST_S or self.rtt_s == math.inf):
            raise WanError(f"an RTT of {self.rtt_s} s cannot be: give 0 to {_LONGEST_S:.0f} s.")
        if not 0 <= self.jitter_s <= _LONGEST_S:
            raise WanError(f"a jitter of {self.jitter_s} s cannot be: give 0 to {_LONGEST_S:.0f} s.")
        if not 0 <= self.loss <= 1:
            raise WanError(f"a loss of {self.loss} cannot be: give a share of the packets, 0 to 1.")
        _check_rate("bandwidth", self.bandwidth_bit_per_s)


Pair = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class WanSpec:
    """Hosts in the order of their addresses, and the directed links between them; where there is none, none.

    Raises WanError for names given twice, links of unknown hosts, and more than MOST_HOSTS hosts.
    """

    hosts: tuple[HostSpec, ...]
    links: Mapping[Pair, LinkSpec] = field(default_factory=dict)
    dilation: float = 1.0
    """Time passes that much slower in the network: delays and jitter are multiplied, bandwidths divided by it."""
    seed: int = 0
    """Of jitter, losses and the ports of symmetric NATs."""

    def __post_init__(self) -> None:
        names = [host.name for host in self.hosts]
        if not 1 <= len(names) <= MOST_HOSTS:
            raise WanError(f"these are {len(names)} hosts: give 1 to {MOST_HOSTS}.")
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise WanError(f"several hosts are called {twice[0]!r}: give each a name of its own.")
        for start, end in self.links:
            if start == end or start not in names or end not in names:
                raise WanError(f"there is no link from {start!r} to {end!r}: name two of the hosts.")
        if not 0.001 <= self.dilation <= 1000:
            raise WanError(f"a dilation of {self.dilation} cannot be: give 0.001 to 1000.")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(host.name for host in self.hosts)

    @classmethod
    def uniform(cls, names: Sequence[str], *, rtt_s: float, dilation: float = 1.0, seed: int = 0) -> Self:
        """Hosts that are all equally far from each other."""
        return cls(
            hosts=tuple(HostSpec(name=name) for name in names),
            links={pair: LinkSpec(rtt_s=rtt_s) for pair in permutations(names, 2)},
            dilation=dilation,
            seed=seed,
        )

    def to_value(self) -> dict[str, Any]:
        """What `from_value` reads as an equal network; JSON without infinities."""
        return {
            "hosts": [dataclasses.asdict(host) for host in self.hosts],
            "links": [
                [*pair, dataclasses.asdict(link)] for pair, link in self.links.items() if math.isfinite(link.rtt_s)
            ],
            "dilation": self.dilation,
            "seed": self.seed,
        }

    @classmethod
    def from_value(cls, value: Mapping[str, Any]) -> Self:
        """From `to_value`, by way of JSON."""
        return cls(
            hosts=tuple(
                HostSpec(**host | {"nat": Nat(host["nat"]) if host["nat"] else None}) for host in value["hosts"]
            ),
            links={(start, end): LinkSpec(**link) for start, end, link in value["links"]},
            dilation=value["dilation"],
            seed=value["seed"],
        )


def _check_rate(what: str, rate: float | None) -> None:
    if rate is not None and not 1000 <= rate < math.inf:
        raise WanError(f"{what}: {rate} bit/s cannot be emulated: give at least 1 kbit/s, or none.")
