"""Live changes of a network: what `geopetals wan set` says, and to whom it applies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from geopetals.wan.errors import WanError
from geopetals.wan.spec import ALL, LinkSpec, Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """New values; None leaves one as it is. A rate of 0 takes a limit away."""

    rtt_s: float | None = None
    jitter_s: float | None = None
    loss: float | None = None
    bandwidth_bit_per_s: float | None = None
    up_bit_per_s: float | None = None
    down_bit_per_s: float | None = None

    def __post_init__(self) -> None:
        LinkSpec(
            rtt_s=self.rtt_s or 0.0,
            jitter_s=self.jitter_s or 0.0,
            loss=self.loss or 0.0,
            bandwidth_bit_per_s=self.bandwidth_bit_per_s or None,
        )
        for rate in (self.up_bit_per_s, self.down_bit_per_s):
            LinkSpec(rtt_s=0.0, bandwidth_bit_per_s=rate or None)
        if not self.to_value():
            raise WanError("nothing is changed: give an RTT, --jitter, --loss, --bandwidth, --up or --down.")

    @property
    def of_hosts(self) -> bool:
        """Whether it changes access lines, which hosts have and links have not."""
        return self.up_bit_per_s is not None or self.down_bit_per_s is not None

    def to_value(self) -> dict[str, float]:
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}

    @classmethod
    def from_value(cls, value: Mapping[str, Any]) -> Self:
        return cls(**value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Hosts, if whole hosts are meant, and the directed pairs that are."""

    hosts: tuple[str, ...]
    pairs: tuple[Pair, ...]


def parse_target(text: str, names: Sequence[str]) -> Target:
    """`A-B` is both directions, `A>B` one, `A` all links of a host, `all` everything.

    Names may have hyphens. Raises WanError where no host or several ways to read it are found.
    """
    if text == ALL:
        return Target(hosts=tuple(names), pairs=tuple((a, b) for a in names for b in names if a != b))
    if text in names:
        others = [name for name in names if name != text]
        return Target(hosts=(text,), pairs=tuple(pair for other in others for pair in ((text, other), (other, text))))
    start, arrow, end = text.partition(">")
    if arrow:
        return Target(hosts=(), pairs=((_known(start.strip(), names), _known(end.strip(), names)),))
    found = list(_splits(text, names))
    if len(found) == 1:
        (one, other) = found[0]
        return Target(hosts=(), pairs=((one, other), (other, one)))
    if found:
        raise WanError(f"{text!r} may be read in {len(found)} ways: name the two directions apart, as in 'A>B'.")
    raise _unknown(text, names)


def _splits(text: str, names: Sequence[str]) -> Iterator[Pair]:
    for index, letter in enumerate(text):
        one, other = text[:index].strip(), text[index + 1 :].strip()
        if letter == "-" and one in names and other in names and one != other:
            yield one, other


def _known(name: str, names: Sequence[str]) -> str:
    if name not in names:
        raise _unknown(name, names)
    return name


def _unknown(text: str, names: Sequence[str]) -> WanError:
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return WanError(f"{text!r} is neither a host nor two with a '-' between: there are {shown}.")
