"""Cluster files: what they may say, how they come back, and the one sentence about what is wrong in them."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.cluster import (
    ClientId,
    ClientSpec,
    Cluster,
    ClusterError,
    DecodeTime,
    ModelSpec,
    Network,
    PlaceId,
    PrefillTime,
    RttMatrix,
    ServerId,
    ServerSpec,
    Workload,
    to_problem,
)
from geopetals.cluster_io import cluster_schema, dump_cluster, load_cluster, parse_cluster
from geopetals.errors import CheckpointError, GeoPetalsError, UnsupportedInput

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples/clusters").glob("*.yaml"))
SMALL = """
model: {name: small, blocks: 4, hidden_size: 8, block_memory: 1 GB, kv_per_token: 1 kB, hidden_state: 16 B}
workload: {prompt_tokens: 10, output_tokens: 20, arrivals: 2/min}
servers:
  - {name: one, memory: 3 GB, decode_block: 5 ms, prefill_block: 20 ms}
  - {name: two, memory: 3 GB, decode_block: {weights: 4 ms, per_session: 1 ms}, prefill_block: {per_token: 2 ms}}
clients:
  - {name: home}
network:
  rtt:
    home: {one: 10 ms, two: 30 ms}
    one: {two: 20 ms}
"""


def parse(text: str) -> Cluster:
    return parse_cluster(text, directory=ROOT)


def changed(old: str, new: str) -> str:
    assert old in SMALL
    return SMALL.replace(old, new, 1)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("as_json", [False, True])
def test_examples_survive_writing_and_reading(path: Path, as_json: bool, tmp_path: Path) -> None:
    cluster = load_cluster(path)
    file = tmp_path / ("cluster.json" if as_json else "cluster.yaml")
    file.write_text(dump_cluster(cluster, as_json=as_json), encoding="utf-8")
    assert load_cluster(file) == cluster


def test_there_are_three_examples() -> None:
    assert len(EXAMPLES) == 3


seconds = st.floats(min_value=1e-9, max_value=50)
names = st.text("abc -_.Ñ1", min_size=1, max_size=9).map(lambda text: f"n{text.strip(' -_')}")


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    hosts = draw(st.lists(names, min_size=2, max_size=5, unique=True))
    places = [PlaceId(host) for host in hosts]
    rtt = st.one_of(st.just(math.inf), seconds)
    server = st.builds(
        ServerSpec,
        id=st.just(ServerId("replaced")),
        memory_bytes=st.integers(1, 10**15),
        decode_block=st.builds(DecodeTime, weights_s=seconds, session_s=st.one_of(st.just(0.0), seconds)),
        prefill_block=st.builds(PrefillTime, fixed_s=seconds, token_s=seconds),
        overhead_s=seconds,
        max_blocks=st.none() | st.integers(4, 100),
        blocks=st.none() | st.just((1, 3)),
        bandwidth_bit_per_s=st.none() | st.floats(1e3, 1e12),
        relayed=st.booleans(),
    )
    drawn = [draw(server) for _ in hosts[1:]]
    return Cluster(
        name=draw(st.none() | names),
        model=ModelSpec(
            name="m",
            num_blocks=draw(st.integers(3, 200)),
            hidden_size=8,
            block_bytes=draw(st.integers(1, 10**12)),
            kv_bytes_per_token=draw(st.integers(1, 10**9)),
            hidden_bytes_per_token=16,
        ),
        workload=Workload(prompt_tokens=3, output_tokens=4, sessions=draw(st.none() | st.integers(1, 99))),
        servers=tuple(
            ServerSpec(
                **{
                    name: getattr(each, name) for name in ServerSpec.__dataclass_fields__ if name not in ("id", "place")
                },
                id=ServerId(host),
                place=draw(st.none() | st.sampled_from(places)),
            )
            for host, each in zip(hosts[1:], drawn, strict=True)
        ),
        clients=(ClientSpec(id=ClientId(hosts[0]), requests_per_s=draw(seconds)),),
        network=Network(
            rtt=RttMatrix(rtts=tuple((a, b, draw(rtt)) for a in places for b in places)), relay_extra_s=draw(seconds)
        ),
    )


@settings(max_examples=60, deadline=None)
@given(cluster=clusters(), as_json=st.booleans())
def test_any_cluster_survives_writing_and_reading(cluster: Cluster, as_json: bool) -> None:
    assert parse_cluster(dump_cluster(cluster, as_json=as_json), directory=ROOT, is_json=as_json) == cluster


def test_the_schema_in_the_package_is_the_one_of_the_dataclasses() -> None:
    shipped = json.loads((ROOT / "geopetals/cluster/schema.json").read_text(encoding="utf-8"))
    assert shipped == cluster_schema(), (
        "write it anew: python -c 'import json; from geopetals.cluster_io import cluster_schema; "
        "print(json.dumps(cluster_schema(), indent=2, ensure_ascii=False))' > geopetals/cluster/schema.json"
    )


def test_the_schema_has_every_key_and_no_other_that_files_may_have() -> None:
    schema = cluster_schema()
    for section in ("workload", "network"):
        known = schema["properties"][section]["properties"]
        for key in known:
            with pytest.raises(ClusterError) as caught:
                parse(changed(f"{section}:", f"{section}:\n  {key}: {{no such: thing}}\nunused:"))
            assert "no such key: did" not in str(caught.value) or key not in str(caught.value)
    assert set(schema["required"]) == {"model", "workload", "servers", "clients", "network"}


def test_count_stands_for_servers_of_the_same_kind() -> None:
    cluster = parse(changed("name: one,", "name: one, count: 3, place: one,"))
    assert [server.id for server in cluster.servers] == ["one-1", "one-2", "one-3", "two"]


def test_spans_are_no_numbers_to_the_base_of_sixty() -> None:
    text = SMALL.replace("blocks: 4", "blocks: 40").replace("name: one,", "name: one, blocks: 10:20,")
    assert parse(text).servers[0].blocks == (10, 20)


def test_a_country_called_no_is_a_name() -> None:
    assert parse(SMALL.replace("home", "no")).clients[0].id == "no"


def test_defaults_may_be_written_or_left_out() -> None:
    assert parse(changed("name: home", "name: home, share: 1, bandwidth: null")) == parse(SMALL)


WRONG = [
    ("memory: 3 GB", "memory: 3", "servers[0].memory: 3 has no unit"),
    ("memory: 3 GB", "memory: -3 GB", "servers[0].memory: -3 GB must be more than 0"),
    ("memory: 3 GB", "memory: 3 Mbit/s", "servers[0].memory: 'Mbit/s' is no unit of amount of memory"),
    ("memory: 3 GB", "memory: 3 gb", "servers[0].memory: 'gb' is no unit of amount of memory: write GB"),
    ("memory: 3 GB", "memroy: 3 GB", "servers[0].memroy: server has no such key: did you mean 'memory'?"),
    ("memory: 3 GB, ", "", "servers[0]: server has no 'memory': add memory"),
    ("decode_block: 5 ms, ", "", "servers[0]: there is no decode_block"),
    ("decode_block: 5 ms", "decode_block: 0 ms", "servers[0].decode_block: a decode step takes no time"),
    ("decode_block: 5 ms", "gpu: rtx-9090", "servers[0].gpu: 'rtx-9090' is not known: choose one of"),
    ("decode_block: 5 ms", "gpu: t4", "servers[one]: to estimate decode_block"),
    ("name: one,", "name: one, blocks: 2:9,", "servers[one].blocks: small has 4 blocks: choose among 0:4"),
    ("name: one,", "name: one, blocks: 3:3,", "servers[0].blocks: (3, 3) holds no block"),
    ("name: one,", "name: one, blocks: 0:3, max_blocks: 2,", "servers[0].blocks: these are 3 blocks"),
    ("name: one,", "name: one, count: 2,", "servers[one-1].place: its name, taken for its place, 'one-1'"),
    ("name: one,", "name: one, count: -2,", "servers[0].count: -2 must be a whole number"),
    ("name: one,", "name: one, relayed: yes,", "servers[0].relayed: 'yes' must be true or false"),
    ("name: one,", "name: one, relayed: true,", "network: one is reached through a relay: give relay_extra"),
    ("name: one,", "name: 1,", "servers[0].name: 1 is a number: put the name in quotes"),
    ("name: one,", "name: two,", "servers: 2 of them are called 'two'"),
    ("per_session: 1 ms", "per_sesion: 1 ms", "servers[1].decode_block.per_sesion: time of a decode step has no such"),
    ("per_token: 2 ms", "per_token: 2", "servers[1].prefill_block.per_token: 2 has no unit"),
    ("name: home", "name: home, place: mars", "clients[home].place: its place 'mars' is not in the network"),
    ("name: home", "name: home, requests: 3/min", "clients[home].requests: is given beside workload.arrivals"),
    ("name: home", "name: home, share: 0", "clients[0].share: 0.0 must be a number above 0"),
    (", arrivals: 2/min", "", "clients[home]: how often it asks is not known"),
    ("arrivals: 2/min", "arrivals: 0/min", "workload.arrivals: 0"),
    ("prompt_tokens: 10", "prompt_tokens: 10.5", "workload.prompt_tokens: 10.5 must be a whole number"),
    ("prompt_tokens: 10", "prompt_tokens: 0", "workload.prompt_tokens: 0 must be a whole number"),
    ("blocks: 4,", "blocks: 4, blocks: 5,", "line 2 is no YAML: the key blocks stands twice"),
    ("blocks: 4", "blocks: four", "model.blocks: 'four' must be a whole number"),
    ("two: 30 ms", "two: 30", "network.rtt.home.two: 30 has no unit"),
    ("two: 30 ms", "two: -1 ms", "network.rtt.home.two: -1 ms must be at least 0 ms"),
    ("two: 30 ms", "two: 30 min", "network.rtt.home.two: 30 min is above 60 s"),
    ("  rtt:", "  map: {places: {home: [1, 2]}}\n  rtt:", "network: give one of 'rtt', 'map' and 'topology'"),
    ("  rtt:", "  matrix:", "network.matrix: network has no such key"),
    ("clients:\n  - {name: home}", "clients: []", "clients: there is none"),
    ("clients:\n  - {name: home}", "clients: {name: home}", "clients: {'name': 'home'} is no list of client"),
    ("clients:\n  - {name: home}", "", "cluster has no 'clients'"),
    ("- {name: home}", "- {name: home", "is no YAML"),
    ("- {name: home}", "- !!python/object:os.system {name: home}", "is no YAML"),
    ("- {name: home}", "- !!int abc", "is no YAML"),
    ("- {name: home}", "- home", "clients[0]: 'home' is no client: write `key: value` pairs"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), WRONG, ids=[new or f"no {old}" for old, new, _ in WRONG])
def test_a_fault_is_one_sentence_with_its_place_in_the_file(old: str, new: str, sentence: str) -> None:
    with pytest.raises(GeoPetalsError) as caught:
        parse(changed(old, new))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "a", "{1: 2}", "[" * 5000, "\x00", "&a [*a]", "? [a]\n: b", "a: &x {b: *x}"]
)
def test_what_is_no_cluster_at_all_is_refused(text: str) -> None:
    for is_json in (False, True):
        with pytest.raises(GeoPetalsError):
            parse_cluster(text, directory=ROOT, is_json=is_json)


STRANGE: list[object] = [
    None,
    True,
    -1,
    0,
    1.5,
    1e300,
    "",
    "x",
    "1 GB",
    "-1 ms",
    "1e999 s",
    [],
    [[]],
    {},
    {"x": 1},
    "\x00",
]


def nodes_of(value: object) -> Iterator[tuple[Any, Any]]:
    """Each place in a tree, as its container and its key there."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from nodes_of(inner)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_whatever_stands_in_a_file_is_read_or_refused(path: Path) -> None:
    """Every value of every example is replaced by strange ones: no other error than an expected one may come of it."""
    tree = load_cluster(path).to_value()
    del tree["servers"][1:-1]
    for container, key in nodes_of(tree):
        kept = container[key]
        for strange in STRANGE:
            container[key] = strange
            with contextlib.suppress(GeoPetalsError):
                to_problem(parse_cluster(json.dumps(tree), directory=path.parent, is_json=True))
        container[key] = kept


def test_json_with_a_key_twice_is_refused() -> None:
    with pytest.raises(ClusterError, match="'model' stands twice"):
        parse_cluster('{"model": 1, "model": 2}', directory=ROOT, is_json=True)


def test_values_are_checked_in_code_as_in_a_file() -> None:
    with pytest.raises(ClusterError, match="memory: -1 B must be more than 0"):
        ServerSpec(
            id=ServerId("a"),
            memory_bytes=-1,
            decode_block=DecodeTime(weights_s=1),
            prefill_block=PrefillTime(fixed_s=1),
        )
    with pytest.raises(ClusterError, match="weights: nan is no time"):
        DecodeTime(weights_s=math.nan)


def test_models_by_card_by_config_and_by_hand(tmp_path: Path) -> None:
    card = parse(SMALL.replace(SMALL.splitlines()[1], "model: {card: llama-3-8b, weights: nf4}")).model
    assert (card.num_blocks, card.block_bytes, card.kv_bytes_per_token) == (32, 122_700_224, 4096)
    assert parse(SMALL.replace(SMALL.splitlines()[1], "model: llama-3-8b")).model.block_bytes == 436_224_000
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4, "vocab_size": 100}))
    text = SMALL.replace(SMALL.splitlines()[1], "model: {config: config.json, dtype: float32}")
    assert parse_cluster(text, directory=tmp_path).model.block_bytes == 4 * (4 * 64 * 64 + 3 * 64 * 96 + 128)


WRONG_MODELS = [
    ("model: {card: llama-3-9b}", CheckpointError, "did you mean llama-3-8b"),
    ("model: {card: llama-3-8b, weights: fp3}", ClusterError, "model.weights: 'fp3' is not known"),
    ("model: {card: llama-3-8b, config: x}", ClusterError, "model.config: is given beside 'card'"),
    ("model: {card: llama-3-8b, blocks: 3}", ClusterError, "model.blocks: does not go together with 'card'"),
    ("model: {card: 3}", ClusterError, "model.card: 3 is a number"),
    ("model: [llama-3-8b]", ClusterError, r"model: \['llama-3-8b'\] is no model"),
    ("model: {name: x}", ClusterError, "model: model has no 'blocks'"),
]


@pytest.mark.parametrize(("line", "error", "words"), WRONG_MODELS, ids=[line for line, _, _ in WRONG_MODELS])
def test_wrong_models_are_refused(line: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse(SMALL.replace(SMALL.splitlines()[1], line))


def test_a_session_longer_than_the_model_allows_is_refused() -> None:
    text = SMALL.replace(SMALL.splitlines()[1], "model: llama-2-7b").replace("output_tokens: 20", "output_tokens: 4090")
    with pytest.raises(ClusterError, match="workload: a session has 4100 tokens, but llama-2-7b takes 4096"):
        parse(text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInput, match=r"nothing\.yaml cannot be read"):
        load_cluster(tmp_path / "nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnsupportedInput, match="no text in UTF-8"):
        load_cluster(tmp_path / "bytes.yaml")
