"""Networks as graphs: the Topology Zoo files that the paper uses, and the collection in the package `topohub`.

In a `.graph` file a link's delay is given, in microseconds one way. In topohub its length is given, in km; its delay is
then that of light in fibre, two thirds of the speed of light in vacuum.
"""

import heapq
import importlib.resources
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from geopetals.errors import UnsupportedInput

FIBRE_KM_PER_S = 2 / 3 * 299_792.458
_EARTH_RADIUS_KM = 6371.0088
TOPOHUB = "topohub:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Nodes and one-way links between them, which carry the index of both ends and the delay in seconds.

    Raises UnsupportedInput for links between nodes that do not exist, and for delays that are none.
    """

    source: str
    nodes: tuple[str, ...]
    links: tuple[tuple[int, int, float], ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise UnsupportedInput(f"the topology {self.source} has no nodes: choose another.")
        for start, end, delay_s in self.links:
            if not (0 <= start < len(self.nodes) and 0 <= end < len(self.nodes)):
                raise UnsupportedInput(
                    f"the topology {self.source} has a link from node {start} to node {end}, but its nodes are "
                    f"0 to {len(self.nodes) - 1}: correct it."
                )
            if not 0 <= delay_s < math.inf:
                raise UnsupportedInput(
                    f"the topology {self.source} has a link with a delay of {delay_s} s: make it 0 or more."
                )

    def index(self, name: str) -> int | None:
        """The node with this name; a number is understood too."""
        if name in self.nodes:
            return self.nodes.index(name)
        return int(name) if name.isdecimal() and int(name) < len(self.nodes) else None

    def delays_from(self, start: int) -> list[float]:
        """The one-way delay of the shortest path to each node, in seconds; infinite where there is none."""
        neighbours: list[list[tuple[int, float]]] = [[] for _ in self.nodes]
        for begin, end, delay_s in self.links:
            neighbours[begin].append((end, delay_s))
        delays = [math.inf] * len(self.nodes)
        delays[start] = 0.0
        heap = [(0.0, start)]
        while heap:
            reached_s, node = heapq.heappop(heap)
            if reached_s > delays[node]:
                continue
            for other, delay_s in neighbours[node]:
                if reached_s + delay_s < delays[other]:
                    delays[other] = reached_s + delay_s
                    heapq.heappush(heap, (delays[other], other))
        return delays


def parse_graph(text: str, *, source: str) -> Topology:
    """A `.graph` file: `NODES n`, a header, n lines of label, x, y; then `EDGES m`, a header, m lines of links.

    Raises UnsupportedInput with the number of the line that is wrong.
    """
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    nodes, rest = _section(lines, "NODES", source)
    edges, _ = _section(rest, "EDGES", source)
    return Topology(
        source=source,
        nodes=tuple(words[0] for _, words in nodes),
        links=tuple(_link(number, words, source) for number, words in edges),
    )


_Lines = list[tuple[int, list[str]]]


def _section(lines: _Lines, name: str, source: str) -> tuple[_Lines, _Lines]:
    head = lines[0][1] if lines else []
    if len(head) != 2 or head[0] != name or not head[1].isdecimal():
        line = f"line {lines[0][0]} of " if lines else ""
        raise UnsupportedInput(f"{line}{source} is not `{name} COUNT`: give a topology in the .graph format.")
    count = int(head[1])
    if len(lines) < count + 2:
        raise UnsupportedInput(f"{source} says {name} {count} but ends before: give the whole file.")
    return lines[2 : count + 2], lines[count + 2 :]


def _link(number: int, words: list[str], source: str) -> tuple[int, int, float]:
    try:
        return int(words[1]), int(words[2]), float(words[5]) / 1e6
    except (IndexError, ValueError):
        raise UnsupportedInput(
            f"line {number} of {source} is no link: write label, from, to, weight, bandwidth and delay."
        ) from None


def from_topohub(name: str) -> Topology:
    """A topology by its name in topohub, for example `topozoo/Abvt`. Raises UnsupportedInput."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", name) or ".." in name:
        raise UnsupportedInput(f"{name[:80]!r} is no name in topohub: write GROUP/NAME, for example topozoo/Abvt.")
    try:
        file = importlib.resources.files("topohub") / f"data/{name}.json"
    except ImportError:
        raise UnsupportedInput(
            "topologies by name come from the package topohub: run `pip install topohub`, or give a .graph file."
        ) from None
    if not file.is_file():
        raise UnsupportedInput(f"topohub has no topology {name!r}: look it up on www.topohub.org.")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))  # topohub.get() leaves the file open
    numbers = {node["id"]: index for index, node in enumerate(found["nodes"])}
    return Topology(
        source=f"{TOPOHUB}{name}",
        nodes=tuple(_unique(str(node.get("name", node["id"])) for node in found["nodes"])),
        links=tuple(_both_ways(found, numbers)),
    )


def _both_ways(found: Mapping[str, Any], numbers: Mapping[object, int]) -> Iterator[tuple[int, int, float]]:
    for edge in found["edges"]:
        start, end, delay_s = numbers[edge["source"]], numbers[edge["target"]], edge["dist"] / FIBRE_KM_PER_S
        yield start, end, delay_s
        yield end, start, delay_s


def _unique(names: Iterator[str]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"


def great_circle_km(one: tuple[float, float], other: tuple[float, float]) -> float:
    """The distance over the ground between two points of (latitude, longitude) in degrees."""
    (lat1, lon1), (lat2, lon2) = ([math.radians(angle) for angle in point] for point in (one, other))
    half = math.sin((lat2 - lat1) / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin((lon2 - lon1) / 2) ** 2
    return 2 * _EARTH_RADIUS_KM * math.asin(math.sqrt(min(half, 1.0)))
