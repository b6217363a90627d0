"""How long a message takes between places: measured RTTs, places on a map, or the nodes of a topology."""

from dataclasses import dataclass
from typing import Annotated, Any, Self

from geopetals.cluster.errors import ClusterError, at, shown_value
from geopetals.cluster.kinds import Amount, Files, Kind, Number, Schema, Whole, mapping
from geopetals.cluster.machines import PlaceId
from geopetals.cluster.quantities import DURATION
from geopetals.cluster.records import Entry, Nested, Record
from geopetals.cluster.rtt_matrix import RttMatrix
from geopetals.errors import UnsupportedInput
from geopetals.topology import TOPOHUB, Topology

DEFAULT_INFLATION = 1.6
DEFAULT_LAST_MILE_S = 0.005
_TIME = Amount(DURATION, most=60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A point on the map, in degrees."""

    id: PlaceId
    latitude: float
    longitude: float


class _Places(Kind):
    """`NAME: [LATITUDE, LONGITUDE]`."""

    def read(self, value: object, files: Files) -> tuple[Place, ...]:
        return tuple(_place(name, point) for name, point in mapping(value, "map of places").items())

    def check(self, value: Any) -> None:
        for place in value:
            if not (-90 <= place.latitude <= 90 and -180 <= place.longitude <= 180):
                raise ClusterError(
                    (place.id,), "lies on no map: write [LATITUDE, LONGITUDE], -90 to 90 and -180 to 180 degrees."
                )

    def write(self, value: tuple[Place, ...]) -> Any:
        return {place.id: [place.latitude, place.longitude] for place in value}

    def schema(self) -> Schema:
        point = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
        return {"type": "object", "minProperties": 1, "additionalProperties": point}


def _place(name: str, point: object) -> Place:
    match point:
        case [int() | float() as latitude, int() | float() as longitude]:
            return Place(id=PlaceId(name), latitude=float(latitude), longitude=float(longitude))
    raise ClusterError((name,), "is no point: write [LATITUDE, LONGITUDE] in degrees, for example [52.5, 13.4].")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldMap(Record):
    """RTT = 2 x inflation x great-circle distance / (2/3 of the speed of light) + last_mile of both ends.

    Inflation: cables are longer than great circles, and routes are no shortest paths. 1.6 is an assumption: measure
    RTTs where it matters.
    """

    WHAT = "map"

    places: Annotated[tuple[Place, ...], Entry("places", _Places(), "NAME: [LATITUDE, LONGITUDE] of each place")]
    inflation: Annotated[
        float, Entry("inflation", Number(least=1, most=10), "how much longer routes are than great circles")
    ] = DEFAULT_INFLATION
    last_mile_s: Annotated[float, Entry("last_mile", _TIME, "what the access line of each end adds to the RTT")] = (
        DEFAULT_LAST_MILE_S
    )


class _Topologies(Kind):
    """A graph; in a file its source stands instead, `name` or `file`, and the graph is read again."""

    def read(self, value: object, files: Files) -> Any:
        if not isinstance(value, Topology):
            raise ClusterError((), "is no key here: give 'name' or 'file'.")
        return value

    def check(self, value: Any) -> None:
        if not isinstance(value, Topology):
            raise ClusterError((), f"{shown_value(value)} is no Topology.")

    def write(self, value: Topology) -> Any:
        return value.source

    def schema(self) -> Schema:
        return {"type": "string"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphNetwork(Record):
    """RTT = 2 x delay of the shortest path x factor + last_mile of both ends.

    Servers and clients without a place stand at random nodes, none twice as long as there are enough.
    """

    WHAT = "topology"

    topology: Annotated[Topology, Entry("topology", _Topologies(), "the graph")]
    seed: Annotated[int, Entry("seed", Whole(least=0), "seed of the random nodes")] = 0
    factor: Annotated[
        float, Entry("factor", Number(least=0, most=1000, positive=True), "by which delays are multiplied")
    ] = 1.0
    last_mile_s: Annotated[float, Entry("last_mile", _TIME, "what the access line of each end adds to the RTT")] = 0.0

    @classmethod
    def from_value(cls, value: object, files: Files) -> Self:
        given = dict(mapping(value, cls.WHAT))
        sources = [key for key in _SOURCES if given.get(key) is not None]
        if len(sources) != 1:
            raise ClusterError((), "give 'name', of a topology in topohub, or 'file', the path of a .graph file.")
        with at(sources[0]):
            given["topology"] = _load(sources[0], given.pop(sources[0]), files)
        return super(GraphNetwork, cls).from_value(given, files)

    def to_value(self) -> Any:
        value = super(GraphNetwork, self).to_value()
        source: str = value.pop("topology")
        name = source.removeprefix(TOPOHUB)
        return {"file" if name == source else "name": name} | value

    @classmethod
    def schema(cls) -> Schema:
        schema = super(GraphNetwork, cls).schema()
        del schema["properties"]["topology"]
        schema["properties"] |= {key: {"type": "string", "description": about} for key, about in _SOURCES.items()}
        return schema | {"required": [], "oneOf": [{"required": [key]} for key in _SOURCES]}


_SOURCES = {"name": "a topology in the package topohub, GROUP/NAME", "file": "path of a .graph file"}


def _load(key: str, source: object, files: Files) -> Topology:
    if not isinstance(source, str):
        raise ClusterError((), f"{shown_value(source)} is no text: write {_SOURCES[key]}.")
    try:
        return files.topology(f"{TOPOHUB}{source}" if key == "name" else files.absolute(source))
    except ClusterError:
        raise
    except UnsupportedInput as error:
        raise ClusterError((), str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Network(Record):
    """One of three ways to say how far places are from each other."""

    WHAT = "network"

    rtt: Annotated[
        RttMatrix | None,
        Entry("rtt", Nested(RttMatrix), "measured RTTs between places, or the path of a CSV file of them"),
    ] = None
    map: Annotated[WorldMap | None, Entry("map", Nested(WorldMap), "places on a map")] = None
    graph: Annotated[GraphNetwork | None, Entry("topology", Nested(GraphNetwork), "a network's nodes and links")] = None
    relay_extra_s: Annotated[
        float | None, Entry("relay_extra", _TIME, "what a relay adds to the RTT of each link of a relayed server")
    ] = None

    def _check(self) -> None:
        if sum(way is not None for way in (self.rtt, self.map, self.graph)) != 1:
            raise ClusterError((), "give one of 'rtt', 'map' and 'topology'.")

    @property
    def places(self) -> frozenset[str] | None:
        """The names that a place may have; None where the topology decides by itself."""
        if self.rtt is not None:
            return frozenset(self.rtt.places)
        if self.map is not None:
            return frozenset(place.id for place in self.map.places)
        return None
