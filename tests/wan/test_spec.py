import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals.errors import UnsupportedInput
from geopetals.wan import HostSpec, LinkSpec, Nat, WanError, WanSpec
from geopetals.wan.changes import Change, parse_target
from geopetals.wan.lateness import Lateness
from geopetals.wan.sources import load_spec

CLUSTERS = Path(__file__).parents[2] / "examples/clusters"


def test_a_network_survives_json() -> None:
    spec = WanSpec(
        hosts=(HostSpec(name="são paulo", up_bit_per_s=1e6, nat=Nat.SYMMETRIC), HostSpec(name="b")),
        links={("são paulo", "b"): LinkSpec(rtt_s=0.1, jitter_s=0.01, loss=0.5, bandwidth_bit_per_s=5e6)},
        dilation=3.0,
        seed=7,
    )
    assert WanSpec.from_value(json.loads(json.dumps(spec.to_value()))) == spec


@pytest.mark.parametrize(
    "broken",
    [
        lambda: WanSpec.uniform([], rtt_s=0.1),
        lambda: WanSpec.uniform(["a", "a"], rtt_s=0.1),
        lambda: WanSpec.uniform(["a", ""], rtt_s=0.1),
        lambda: WanSpec.uniform(["a", "all"], rtt_s=0.1),
        lambda: WanSpec.uniform(["a", "b>c"], rtt_s=0.1),
        lambda: WanSpec.uniform([f"h{number}" for number in range(251)], rtt_s=0.1),
        lambda: WanSpec.uniform(["a", "b"], rtt_s=-0.1),
        lambda: WanSpec.uniform(["a", "b"], rtt_s=math.nan),
        lambda: WanSpec.uniform(["a", "b"], rtt_s=0.1, dilation=math.nan),
        lambda: WanSpec(hosts=(HostSpec(name="a"),), links={("a", "b"): LinkSpec(rtt_s=0.1)}),
        lambda: LinkSpec(rtt_s=0.1, loss=1.5),
        lambda: LinkSpec(rtt_s=0.1, jitter_s=math.inf),
        lambda: LinkSpec(rtt_s=0.1, bandwidth_bit_per_s=0),
        lambda: HostSpec(name="a", up_bit_per_s=math.inf),
        lambda: Change(),
        lambda: Change(rtt_s=-1),
        lambda: Change(up_bit_per_s=-5),
    ],
)
def test_what_cannot_be_is_refused(broken: object) -> None:
    with pytest.raises(WanError):
        broken()  # type: ignore[operator]


NAMES = ("a", "a-b", "b", "b-c", "c", "new york")


def test_targets_name_hosts_and_pairs() -> None:
    assert parse_target("a-c", NAMES).pairs == (("a", "c"), ("c", "a"))
    assert parse_target("b-c", NAMES).hosts == ("b-c",)
    assert parse_target("new york-a-b", NAMES).pairs == (("new york", "a-b"), ("a-b", "new york"))
    assert parse_target("a > b-c", NAMES).pairs == (("a", "b-c"),)
    assert len(parse_target("a", NAMES).pairs) == 2 * (len(NAMES) - 1)
    assert parse_target("all", NAMES).hosts == NAMES


@pytest.mark.parametrize(
    ("target", "words"), [("a-b-c", "2 ways"), ("x", "neither"), ("a>x", "'x'"), ("a-a", "neither")]
)
def test_targets_that_nobody_has_are_refused(target: str, words: str) -> None:
    with pytest.raises(WanError, match=words):
        parse_target(target, NAMES)


def test_a_cluster_gives_a_host_for_each_machine() -> None:
    spec = load_spec(str(CLUSTERS / "campus.yaml"))
    assert spec.names == (
        "students",
        *(f"mig-a-{n}" for n in (1, 2, 3)),
        *(f"mig-b-{n}" for n in (1, 2, 3, 4)),
        "a100-1",
        "a100-2",
    )
    assert spec.links["students", "mig-a-1"].rtt_s == pytest.approx(0.005)
    assert spec.links["mig-b-2", "a100-1"].rtt_s == pytest.approx(0.1)


def test_a_cluster_gives_its_lines_and_what_relays_add() -> None:
    spec = load_spec(str(CLUSTERS / "home-gpus.yaml"))
    lines = {host.name: (host.up_bit_per_s, host.down_bit_per_s) for host in spec.hosts}
    assert lines["tokyo"] == (500e6, 500e6)
    assert lines["europeans"] == (None, None)
    assert spec.links["berlin", "warsaw"].rtt_s > 0.04


def test_a_client_called_like_a_server_gets_another_name(tmp_path: Path) -> None:
    text = (CLUSTERS / "home-gpus.yaml").read_text().replace("name: europeans", "name: paris")
    (tmp_path / "cluster.yaml").write_text(text)
    assert load_spec(str(tmp_path / "cluster.yaml")).names[0] == "paris-client"


def test_a_table_of_rtts_gives_a_host_for_each_place(tmp_path: Path) -> None:
    table = tmp_path / "rtt.csv"
    table.write_text("ms,berlin,paris,rome\nberlin,1,24,none\nparis,30,1,\n")
    spec = load_spec(str(table))
    assert spec.names == ("berlin", "paris", "rome")
    assert spec.links["berlin", "paris"].rtt_s == pytest.approx(0.024)
    assert spec.links["paris", "berlin"].rtt_s == pytest.approx(0.030)
    assert spec.links["rome", "berlin"].rtt_s == math.inf
    assert ("rome", "paris") not in spec.links


def test_a_topology_gives_a_host_for_each_node() -> None:
    spec = load_spec(str(CLUSTERS / "research-network.graph"))
    assert len(spec.hosts) == 22
    assert spec.links["London", "Paris"].rtt_s == pytest.approx(2 * 2148e-6)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    for source in ("none.yaml", "none.csv", "none.graph"):
        with pytest.raises(UnsupportedInput, match="none"):
            load_spec(str(tmp_path / source))


@given(st.lists(st.floats(-1e-3, 1), min_size=1))
def test_lateness_counts_every_packet_and_bounds_its_quantiles(late: list[float]) -> None:
    found = Lateness()
    for late_s in late:
        found.add(late_s)
    shown = found.to_value()
    true = sorted(max(late_s, 0.0) for late_s in late)
    assert sum(shown["histogram"].values()) == shown["packets"] == len(late)
    assert shown["max_s"] == true[-1]
    for share, name in ((0.5, "p50_s"), (0.9, "p90_s"), (0.99, "p99_s")):
        assert shown[name] >= true[math.ceil(share * len(true)) - 1] - 1e-12
        assert shown[name] <= shown["max_s"]
