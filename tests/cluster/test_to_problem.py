"""What placement and routing are given for a cluster: delays, times and limits, in seconds and bytes."""

from pathlib import Path

import numpy as np
import pytest

from geopetals.cluster import Cluster, ClusterError, to_problem
from geopetals.cluster.delays import nodes, rtt_s
from geopetals.cluster_io import parse_cluster
from geopetals.errors import GeoPetalsError, MemoryShortage
from geopetals.topology import FIBRE_KM_PER_S, great_circle_km

ROOT = Path(__file__).parents[2]
HEAD = """
model: {name: small, blocks: 4, hidden_size: 8, block_memory: 1 GB, kv_per_token: 1 kB, hidden_state: 1000 B}
workload: {prompt_tokens: 10, output_tokens: 20, arrivals: 2/s}
"""
SERVERS = """
servers:
  - {name: one, memory: 3 GB, decode_block: 5 ms, prefill_block: 20 ms, overhead: 1 ms}
  - name: two
    memory: 4.5 GB
    max_blocks: 3
    blocks: 1:3
    decode_block: {weights: 4 ms, per_session: 2 ms}
    prefill_block: {fixed: 1 ms, per_token: 2 ms}
    overhead: 3 ms
    bandwidth: 8 Mbit/s
"""
CLIENTS = """
clients:
  - {name: here, share: 3}
  - {name: there, bandwidth: 4 Mbit/s}
"""
RTT = """
network:
  rtt:
    here: {one: 10 ms, two: 30 ms, there: 50 ms}
    there: {one: 40 ms, two: 20 ms}
    one: {two: 60 ms}
"""


def cluster(network: str = RTT, *, servers: str = SERVERS, clients: str = CLIENTS, directory: Path = ROOT) -> Cluster:
    return parse_cluster(HEAD + servers + clients + network, directory=directory)


def test_sizes_times_and_limits() -> None:
    problem = to_problem(cluster())
    assert (problem.num_blocks, problem.block_bytes, problem.output_tokens) == (4, 1e9, 20)
    assert problem.kv_bytes == 30 * 1000
    assert problem.memory_bytes.tolist() == [3e9, 4.5e9]
    assert problem.max_blocks.tolist() == [4, 3]
    assert problem.pinned == (None, (1, 3))
    assert problem.decode_block_s == pytest.approx([0.005, 0.006])
    assert problem.prefill_block_s == pytest.approx([0.020, 0.021])
    assert problem.demand_per_s == pytest.approx([1.5, 0.5])
    assert problem.contention is not None
    assert problem.contention.floor_s == pytest.approx([0.005, 0.004])
    assert problem.contention.session_s == pytest.approx([0, 0.002])
    assert to_problem(cluster(), contention=False).contention is None


def test_a_relayed_hop_is_a_round_trip_with_its_overhead_and_transfers_over_the_slower_line() -> None:
    problem = to_problem(cluster())
    # 1000 bytes over 8 Mbit/s take 1 ms, over 4 Mbit/s 2 ms; there and back.
    assert problem.relay_decode_s == pytest.approx(
        np.array([[0.010 + 0.001, 0.030 + 0.003 + 0.002], [0.040 + 0.001 + 0.004, 0.020 + 0.003 + 0.004]])
    )
    assert problem.relay_prefill_s == pytest.approx(
        np.array([[0.010 + 0.001, 0.030 + 0.003 + 0.020], [0.040 + 0.001 + 0.040, 0.020 + 0.003 + 0.040]])
    )


def test_a_pushed_message_takes_half_a_round_trip_and_the_receivers_overhead() -> None:
    push = to_problem(cluster()).push
    assert push is not None
    assert push.decode.from_client_s == pytest.approx(np.array([[0.006, 0.019], [0.023, 0.015]]))
    assert push.decode.to_client_s == pytest.approx(np.array([[0.005, 0.022], [0.016, 0.012]]))
    assert push.decode.between_s[0, 1] == pytest.approx(0.030 + 0.003 + 0.001)
    assert push.decode.between_s[1, 0] == pytest.approx(0.030 + 0.001 + 0.001)
    assert push.prefill.between_s[0, 1] == pytest.approx(0.030 + 0.003 + 0.010)


def test_a_chain_of_one_server_costs_the_same_by_relay_and_by_push() -> None:
    problem = to_problem(cluster())
    assert problem.push is not None
    for relay_s, push in (
        (problem.relay_decode_s, problem.push.decode),
        (problem.relay_prefill_s, problem.push.prefill),
    ):
        assert push.from_client_s + push.to_client_s.T == pytest.approx(relay_s)


def test_relays_lengthen_each_link_of_their_servers_once() -> None:
    relayed = SERVERS.replace("name: one,", "name: one, relayed: true,").replace(
        "name: two\n", "name: two\n    relayed: true\n"
    )
    plain = rtt_s(cluster())
    longer = rtt_s(cluster(RTT + "  relay_extra: 40 ms\n", servers=relayed))
    added = longer - plain
    assert added[:2, 2:] == pytest.approx(0.040)
    assert added[2, 3] == pytest.approx(0.040)
    assert added[0, 1] == 0
    assert not added.diagonal().any()


def test_on_a_map_rtt_is_light_in_fibre_over_inflated_great_circles_and_the_last_miles() -> None:
    world = """
network:
  map:
    places: {here: [0, 0], there: [0, 90], one: [0, 0], two: [45, 0]}
    inflation: 2
    last_mile: 4 ms
"""
    rtts = rtt_s(cluster(world))
    assert rtts[0, 1] == pytest.approx(4 * great_circle_km((0, 0), (0, 90)) / FIBRE_KM_PER_S + 0.008)
    assert rtts[0, 2] == pytest.approx(0.008)
    assert rtts[0, 0] == 0


GRAPH = """NODES 5
label x y
a 0 0
b 0 0
c 0 0
d 0 0
alone 0 0
EDGES 6
label src dest weight bw delay
e 0 1 1 1 1000
e 1 0 1 1 1000
e 1 2 1 1 2000
e 2 1 1 1 2000
e 2 3 1 1 4000
e 3 2 1 1 4000
"""
PLACED = (
    CLIENTS.replace("name: here", "name: here, place: a").replace("name: there", "name: there, place: b"),
    SERVERS.replace("name: one", "name: one, place: c").replace("name: two\n", "name: two\n    place: d\n"),
)


def test_on_a_topology_rtt_is_twice_the_shortest_path(tmp_path: Path) -> None:
    (tmp_path / "x.graph").write_text(GRAPH)
    clients, servers = PLACED
    network = "network: {topology: {file: x.graph, factor: 2, last_mile: 1 ms}}"
    rtts = rtt_s(cluster(network, clients=clients, servers=servers, directory=tmp_path))
    assert rtts[0] == pytest.approx([0, 0.004 + 0.002, 0.012 + 0.002, 0.028 + 0.002])


def test_who_has_no_place_stands_at_a_random_node_which_the_seed_decides(tmp_path: Path) -> None:
    (tmp_path / "x.graph").write_text(GRAPH)

    def placed(seed: int, clients: str = CLIENTS) -> list[int]:
        network = f"network: {{topology: {{file: x.graph, seed: {seed}}}}}"
        built = cluster(network, clients=clients, directory=tmp_path)
        assert built.network.graph is not None
        return nodes(built.network.graph, built)

    assert placed(3) == placed(3)
    assert len({tuple(placed(seed)) for seed in range(20)}) > 5
    assert all(len(set(placed(seed))) == 4 for seed in range(20))
    crowd = CLIENTS + "".join(f"  - {{name: n{number}, place: d}}\n" for number in range(5))
    assert all(3 not in placed(seed, crowd)[:2] for seed in range(20))
    assert placed(3) == [0, 3, 4, 2]  # the same on every machine and Python


def test_a_csv_file_gives_rtts(tmp_path: Path) -> None:
    (tmp_path / "rtt.csv").write_text(
        "ms,here,there,one,two\nhere,0,50,10,30\nthere,,0,40,20\none,,,0,60\ntwo,,,,0\n", encoding="utf-8"
    )
    assert rtt_s(cluster("network: {rtt: rtt.csv}", directory=tmp_path)) == pytest.approx(rtt_s(cluster()))


WRONG_TABLES = [
    ("", "has no table"),
    ("here,there\nhere,1\n", "'here' is no unit of time"),
    ("ms,here,there\nhere,1\n", "row 2 .* has 1 RTTs for 2 places"),
    ("ms,here,here\nhere,1,2\n", "names a place twice"),
    ("ms,here,there\nhere,1,x\n", "row 2 .*'x ms' is no time"),
    ("ms,here\nhere,1\nhere,2\n", "row 3 .* is the second for 'here'"),
    ("ms,here\nhere,-1\n", "-1 ms must be at least 0"),
]


@pytest.mark.parametrize(("text", "words"), WRONG_TABLES, ids=[words for _, words in WRONG_TABLES])
def test_a_broken_csv_file_is_refused_with_its_row(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "rtt.csv").write_text(text)
    with pytest.raises(ClusterError, match=words) as caught:
        cluster("network: {rtt: rtt.csv}", directory=tmp_path)
    assert str(caught.value).startswith("network.rtt")


def test_what_cannot_be_planned_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.graph").write_text(GRAPH)
    clients, servers = PLACED
    graph = "network: {topology: {file: x.graph}}"
    faults: list[tuple[Cluster, type[GeoPetalsError], str]] = [
        (
            cluster(RTT.replace(", two: 30 ms", "")),
            ClusterError,
            "network.rtt: the RTT from here to two is not given: add it, or write `none`",
        ),
        (
            cluster(RTT.replace("two: 30 ms", "two: none")),
            ClusterError,
            "clients[here]: no chain of servers leads through the model: it reaches 1 of 2, which hold 2 of 4 blocks",
        ),
        (
            cluster(graph, clients=clients.replace("place: a", "place: alone"), servers=servers, directory=tmp_path),
            ClusterError,
            "network.topology: no path leads from alone to b",
        ),
        (
            cluster(graph, clients=clients.replace("place: a", "place: zz"), servers=servers, directory=tmp_path),
            ClusterError,
            "clients[here].place: the topology has no node 'zz': use one of a, b",
        ),
        (
            cluster(servers=SERVERS.replace("4.5 GB", "2 GB").replace("blocks: 1:3", "relayed: false")),
            MemoryShortage,
            "servers: small has 4 blocks of 1.0 GB, all servers together hold 3: add servers with 1.0 GB",
        ),
    ]
    for given, error, sentence in faults:
        with pytest.raises(error) as caught:
            to_problem(given)
        assert sentence in str(caught.value)
        assert caught.value.exit_code == 2


def test_times_are_estimated_from_the_gpu_where_they_are_not_given() -> None:
    text = (HEAD + SERVERS + CLIENTS + RTT).replace(HEAD.splitlines()[1], "model: llama-3-8b")
    gpu = text.replace("decode_block: 5 ms, prefill_block: 20 ms", "gpu: rtx-3090").replace("3 GB", "20 GB")
    problem = to_problem(parse_cluster(gpu, directory=ROOT))
    # 436 MB at 60 % of 936 GB/s and 0.3 ms; two operations for each of 218 million parameters at 40 % of 71 Tflop/s.
    assert problem.decode_block_s[0] == pytest.approx(0.436e9 / (0.6 * 936e9) + 0.0003, rel=0.05)
    assert problem.prefill_block_s[0] == pytest.approx(
        0.436e9 / (0.6 * 936e9) + 0.0003 + 10 * 2 * 218e6 / (0.4 * 71e12), rel=0.01
    )
    given = to_problem(parse_cluster(gpu.replace("gpu:", "decode_block: 9 ms, gpu:"), directory=ROOT))
    assert given.decode_block_s[0] == 0.009
