import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from geopetals.errors import BlocksError, MemoryShortage, UnsupportedInput
from geopetals.swarm import devices
from geopetals.swarm.blocks import choose_blocks, default_kv_tokens, kv_bytes_per_token
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.local import even_spans
from geopetals.swarm.profile import Throughput, measure
from geopetals.swarm.records import ServerRecord
from geopetals.swarm.stack import ServerState
from geopetals.swarm.stage import load_stage
from tests.models import save_llama

GB = 10**9
PEERS = (
    "12D3KooWAkxmPQg8FgoTvy7Wi2hWbjBJYuFBQ1q2JX7oxEkXb4jD",
    "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(str(save_llama(tmp_path_factory.mktemp("blocks"), layers=6)))


def server(start: int, end: int, *, peer_id: str = PEERS[0], throughput: float = 10.0) -> ServerRecord:
    return ServerRecord(peer_id=peer_id, start=start, end=end, state=ServerState.ONLINE, throughput=throughput)


def choose(
    checkpoint: Checkpoint,
    servers: list[ServerRecord],
    *,
    wanted: tuple[int, int] | None = None,
    count: int | None = None,
    memory_bytes: int = GB,
    kv_tokens: int = 64,
) -> tuple[int, int]:
    return choose_blocks(
        checkpoint,
        servers,
        wanted=wanted,
        count=count,
        block_bytes=checkpoint.block_bytes(torch.float32),
        dtype=torch.float32,
        memory_bytes=memory_bytes,
        kv_tokens=kv_tokens,
    )


def room_for(checkpoint: Checkpoint, blocks: float, kv_tokens: int = 64) -> int:
    kv = kv_tokens * kv_bytes_per_token(checkpoint.config, torch.float32)
    return int(blocks * (checkpoint.block_bytes(torch.float32) + kv))


def test_with_memory_to_spare_all_blocks_are_taken(checkpoint: Checkpoint) -> None:
    assert choose(checkpoint, []) == (0, 6)


def test_memory_limits_the_span(checkpoint: Checkpoint) -> None:
    start, end = choose(checkpoint, [], memory_bytes=room_for(checkpoint, 2.5))
    assert end - start == 2


def test_what_the_swarm_lacks_is_taken(checkpoint: Checkpoint) -> None:
    two = room_for(checkpoint, 2)
    assert choose(checkpoint, [server(0, 4)], memory_bytes=two) == (4, 6)
    assert choose(checkpoint, [server(2, 6)], memory_bytes=two) == (0, 2)
    both = [server(0, 2), server(4, 6, peer_id=PEERS[1])]
    assert choose(checkpoint, both, memory_bytes=two) == (2, 4)


def test_the_weakest_part_is_strengthened(checkpoint: Checkpoint) -> None:
    servers = [server(0, 3, throughput=1.0), server(3, 6, peer_id=PEERS[1], throughput=50.0)]
    assert choose(checkpoint, servers, memory_bytes=room_for(checkpoint, 3)) == (0, 3)


def test_a_number_of_blocks_is_taken_where_they_are_missing(checkpoint: Checkpoint) -> None:
    assert choose(checkpoint, [server(0, 4)], count=2) == (4, 6)
    assert choose(checkpoint, [], count=99) == (0, 6)
    with pytest.raises(MemoryShortage):
        choose(checkpoint, [], count=4, memory_bytes=room_for(checkpoint, 2))


def test_a_wish_is_granted(checkpoint: Checkpoint) -> None:
    assert choose(checkpoint, [server(1, 3)], wanted=(1, 3)) == (1, 3)


@pytest.mark.parametrize("wanted", [(0, 7), (6, 7), (-1, 2), (3, 3), (4, 2)])
def test_blocks_outside_the_model_are_refused(checkpoint: Checkpoint, wanted: tuple[int, int]) -> None:
    with pytest.raises(BlocksError):
        choose(checkpoint, [], wanted=wanted)


def test_too_many_blocks_for_the_memory_say_how_many_fit(checkpoint: Checkpoint) -> None:
    with pytest.raises(MemoryShortage, match="2 of them would fit"):
        choose(checkpoint, [], wanted=(0, 4), memory_bytes=room_for(checkpoint, 2))


def test_too_little_memory_for_one_block_says_what_to_change(checkpoint: Checkpoint) -> None:
    with pytest.raises(MemoryShortage, match=r"not even one fits: allow more --memory or a smaller --kv-cache-tokens"):
        choose(checkpoint, [], memory_bytes=room_for(checkpoint, 0.5))


@pytest.mark.parametrize("peer_id", ["nobody", "0OIl", "é"])
def test_a_record_of_nobody_does_not_keep_a_server_from_starting(checkpoint: Checkpoint, peer_id: str) -> None:
    assert choose(checkpoint, [server(0, 3, peer_id=peer_id)], memory_bytes=room_for(checkpoint, 3))[1] <= 6


def test_the_estimate_of_the_cache_is_what_the_blocks_take(checkpoint: Checkpoint) -> None:
    stage = load_stage(checkpoint, 1, 3, dtype=torch.float32, device=torch.device("cpu"))
    assert kv_bytes_per_token(checkpoint.config, torch.float32) == stage.kv_bytes_per_token()
    assert kv_bytes_per_token(checkpoint.config, torch.bfloat16) * 2 == stage.kv_bytes_per_token()


def test_grouped_heads_get_more_tokens() -> None:
    assert default_kv_tokens(LlamaConfig(num_attention_heads=8, num_key_value_heads=2)) == 16384
    assert default_kv_tokens(LlamaConfig(num_attention_heads=8, num_key_value_heads=8)) == 4096


def test_a_server_measures_itself_and_keeps_nothing(checkpoint: Checkpoint) -> None:
    stage = load_stage(checkpoint, 0, 2, dtype=torch.float32, device=torch.device("cpu"))
    speed = measure(stage)
    assert speed.inference_rps > 0
    assert speed.forward_rps > 0


def test_a_server_of_many_blocks_serves_each_request_slower() -> None:
    speed = Throughput(inference_rps=100.0, forward_rps=300.0)
    assert speed.of_server(1) == pytest.approx(300)
    assert speed.of_server(5) == pytest.approx(100)


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(UnsupportedInput, match="cuda:77 is not there: try --device cpu"):
        devices.choose_device("cuda:77")


def test_on_a_cpu_float32_is_the_default() -> None:
    cpu = torch.device("cpu")
    assert devices.choose_dtype(None, cpu, torch.bfloat16) == torch.float32
    assert devices.choose_dtype("bfloat16", cpu, torch.float16) == torch.bfloat16


def test_memory_is_measured() -> None:
    assert devices.usable_memory(torch.device("cpu")) > 0
    assert devices.process_memory_bytes() > 10**6


@given(st.integers(1, 200).flatmap(lambda blocks: st.tuples(st.just(blocks), st.integers(1, blocks))))
def test_even_spans_cover_the_model_once(numbers: tuple[int, int]) -> None:
    num_blocks, servers = numbers
    spans = even_spans(num_blocks, servers)
    assert [block for start, end in spans for block in range(start, end)] == list(range(num_blocks))
    lengths = [end - start for start, end in spans]
    assert len(lengths) == servers
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("servers", [0, -1, 7])
def test_more_servers_than_blocks_are_refused(servers: int) -> None:
    with pytest.raises(UnsupportedInput, match="1 to 6 servers"):
        even_spans(6, servers)
