import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals import topology
from geopetals.errors import UnsupportedInput
from geopetals.topology import FIBRE_KM_PER_S, Topology, from_topohub, great_circle_km, parse_graph

GRAPH = """NODES 3
label x y
0_Paris 2.35 48.86
1_Berlin 13.4 52.52
2_Rome 12.5 41.9

EDGES 4
label src dest weight bw delay
edge_0 0 1 1 1000000 5000
edge_1 1 0 1 1000000 5000
edge_2 1 2 1 1000000 7000
edge_3 2 1 1 1000000 7000
"""


def test_a_graph_file_gives_nodes_and_delays_in_seconds() -> None:
    graph = parse_graph(GRAPH, source="x.graph")
    assert graph.nodes == ("0_Paris", "1_Berlin", "2_Rome")
    assert graph.delays_from(0) == pytest.approx([0, 0.005, 0.012])
    assert graph.index("1_Berlin") == graph.index("1") == 1
    assert graph.index("Madrid") is graph.index("3") is None


WRONG = [
    ("", "is not `NODES COUNT`"),
    ("NODES 3", "says NODES 3 but ends before"),
    (GRAPH.replace("EDGES 4", "EDGES 5"), "says EDGES 5 but ends before"),
    (GRAPH.replace("EDGES 4", "LINKS 4"), r"line 7 of x\.graph is not `EDGES COUNT`"),
    (GRAPH.replace("edge_1 1 0 1 1000000 5000", "edge_1 1 0"), r"line 10 of x\.graph is no link"),
    (GRAPH.replace("edge_1 1 0", "edge_1 1 9"), "node 1 to node 9"),
    (GRAPH.replace("7000", "-7"), "delay of -7e-06 s"),
    (GRAPH.replace("7000", "nan"), "delay of nan s"),
    ("NODES 0\nlabel x y\nEDGES 0\nlabel a b c d e", "has no nodes"),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_broken_graph_file_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(UnsupportedInput, match=words):
        parse_graph(text, source="x.graph")


links = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)), max_size=20)


@given(links=links)
def test_delays_are_those_of_the_shortest_paths(links: list[tuple[int, int, int]]) -> None:
    graph = Topology(source="t", nodes=tuple("abcdef"), links=tuple((a, b, float(d)) for a, b, d in links))
    delays = [[math.inf] * 6 for _ in range(6)]
    for node in range(6):
        delays[node][node] = 0
    for start, end, delay in links:
        delays[start][end] = min(delays[start][end], delay)
    for middle in range(6):  # Floyd-Warshall
        for start in range(6):
            for end in range(6):
                delays[start][end] = min(delays[start][end], delays[start][middle] + delays[middle][end])
    assert [graph.delays_from(node) for node in range(6)] == delays


def test_topohub_gives_delays_of_light_in_fibre() -> None:
    graph = from_topohub("sndlib/polska")
    assert len(graph.nodes) == 12
    assert len(graph.links) == 2 * 18
    start, end, delay_s = graph.links[0]
    assert (graph.nodes[start], graph.nodes[end]) == ("Gdansk", "Warsaw")
    assert delay_s * FIBRE_KM_PER_S == pytest.approx(273.93)


@pytest.mark.parametrize("name", ["sndlib/atlantis", "../../etc/passwd", "", "sndlib"])
def test_a_name_that_topohub_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedInput, match="topohub"):
        from_topohub(name)


def test_without_topohub_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "topohub", None)
    with pytest.raises(UnsupportedInput, match="pip install topohub"):
        from_topohub("sndlib/polska")


def test_great_circles() -> None:
    assert great_circle_km((0, 0), (0, 180)) == pytest.approx(math.pi * 6371.0088)
    assert great_circle_km((52.52, 13.40), (40.71, -74.01)) == pytest.approx(6385, rel=0.01)
    assert great_circle_km((10, 20), (10, 20)) == 0


def test_the_example_graph_is_connected() -> None:
    path = Path(topology.__file__).parents[1] / "examples/clusters/research-network.graph"
    graph = parse_graph(path.read_text(), source=str(path))
    assert all(math.isfinite(delay) for node in range(len(graph.nodes)) for delay in graph.delays_from(node))
