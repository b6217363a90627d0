import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, T5Config

from geopetals.errors import BlocksError, CheckpointError
from geopetals.swarm.checkpoint import INDEX, SINGLE, Checkpoint
from geopetals.swarm.stage import load_stage
from tests.models import save_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("sharded"), sharded=True)


@pytest.fixture
def scratch(sharded: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def shards_of(directory: Path, block: int) -> set[str]:
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    return {shard for key, shard in index.items() if f".layers.{block}." in key}


def refusal(model: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(str(model))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_opening_reads_no_weights(sharded: Path, tmp_path: Path) -> None:
    for name in ("config.json", INDEX):
        shutil.copy(sharded / name, tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert (checkpoint.num_blocks, checkpoint.revision, checkpoint.name) == (6, None, str(tmp_path))
    assert checkpoint.identity().fingerprint is None


def test_hashes_do_not_depend_on_sharding(single: Path, sharded: Path) -> None:
    one, many = Checkpoint.open(str(single)), Checkpoint.open(str(sharded))
    assert [one.block_hash(block) for block in range(6)] == [many.block_hash(block) for block in range(6)]
    assert len({one.block_hash(block) for block in range(6)}) == 6
    assert one.identity().fingerprint == many.identity().fingerprint
    assert one.identity().config_hash == many.identity().config_hash


def test_other_weights_are_told_apart(single: Path, tmp_path: Path) -> None:
    other = Checkpoint.open(str(save_llama(tmp_path, seed=1)))
    checkpoint = Checkpoint.open(str(single))
    assert other.block_hash(0) != checkpoint.block_hash(0)
    assert "weights" in (checkpoint.identity().conflict(other.identity()) or "")


def test_another_architecture_is_told_apart(single: Path, tmp_path: Path) -> None:
    other = Checkpoint.open(str(save_llama(tmp_path, rms_norm_eps=1e-3)))
    assert "configurations" in (Checkpoint.open(str(single)).identity().conflict(other.identity()) or "")


def test_config_hash_ignores_who_saved_it(scratch: Path) -> None:
    before = Checkpoint.open(str(scratch)).identity().config_hash
    config = json.loads((scratch / "config.json").read_text())
    config |= {"transformers_version": "4.0", "_name_or_path": "x", "torch_dtype": "float16", "eos_token_id": 9}
    (scratch / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(str(scratch)).identity().config_hash == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_bytes_are_what_a_block_takes(sharded: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(sharded)
    expected = sum(parameter.numel() for parameter in model.model.layers[0].parameters()) * dtype.itemsize
    assert Checkpoint.open(str(sharded)).block_bytes(dtype) == expected
    for name in ("config.json", INDEX):
        shutil.copy(sharded / name, tmp_path)
    assert Checkpoint.open(str(tmp_path)).block_bytes(dtype) == expected


def test_only_needed_shards_are_read(scratch: Path) -> None:
    needed = shards_of(scratch, 2) | shards_of(scratch, 3)
    for path in scratch.glob("*.safetensors"):
        if path.name not in needed:
            path.write_bytes(b"not weights at all")
    checkpoint = Checkpoint.open(str(scratch))
    with checkpoint.view(lambda key: ".layers.2." in key or ".layers.3." in key) as view:
        assert {path.resolve().name for path in view.glob("*.safetensors")} == needed
    assert not view.exists()
    load_stage(checkpoint, 2, 4, dtype=torch.float32, device=CPU)
    assert checkpoint.identity().fingerprint is None


def test_absent_shards_of_other_blocks_do_not_matter(scratch: Path) -> None:
    needed = shards_of(scratch, 5)
    for path in scratch.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
    load_stage(Checkpoint.open(str(scratch)), 5, 6, dtype=torch.float32, device=CPU)


def test_view_is_removed_after_a_failure(sharded: Path) -> None:
    before = set(Path(tempfile.gettempdir()).iterdir())
    with pytest.raises(KeyError), Checkpoint.open(str(sharded)).view(lambda key: True):
        raise KeyError
    assert set(Path(tempfile.gettempdir()).iterdir()) == before


def test_tokenizer_speaks_any_text(single: Path) -> None:
    tokenizer = Checkpoint.open(str(single)).tokenizer()
    assert tokenizer.decode(tokenizer("hé ж 你").input_ids) == "hé ж 你"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<s>user: hi</s><s>assistant: "


def test_missing_tokenizer_is_said(scratch: Path) -> None:
    for path in scratch.glob("*token*"):
        path.unlink()
    (scratch / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer"):
        Checkpoint.open(str(scratch)).tokenizer()


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 3), (4, 2), (0, 7), (6, 7)])
def test_blocks_outside_the_model(single: Path, start: int, end: int) -> None:
    with pytest.raises(BlocksError, match=r"0:6"):
        load_stage(Checkpoint.open(str(single)), start, end, dtype=torch.float32, device=CPU)


def test_unknown_model(tmp_path: Path) -> None:
    message = refusal("nobody/no-such-model")
    assert "no directory" in message
    assert "Hub" in message
    assert "no directory" in refusal(tmp_path / "nothing")
    assert "no directory" in refusal("")
    assert "cannot be read" in refusal("x" * 5000)


def test_directory_that_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")
    (tmp_path / "config.json").write_text("{broken")
    assert "JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    assert "no_such_family" in refusal(tmp_path)


def test_without_weights_or_with_pickles_only(single: Path, tmp_path: Path) -> None:
    shutil.copy(single / "config.json", tmp_path)
    assert "no weights" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_remote_code_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    (tmp_path / SINGLE).write_bytes(b"")
    assert "code of its own" in refusal(tmp_path)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / SINGLE).write_bytes(b"")
    assert "encoder-decoder" in refusal(tmp_path / "t5")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"num_hidden_layers": None},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -6},
        {"num_hidden_layers": 7},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"hidden_act": "no_such_activation"},
        {"rope_parameters": {"rope_type": "no_such_rope"}},
        {"rope_parameters": 3},
        {"vocab_size": {}},
        {"architectures": 5},
        {"layer_types": ["full_attention"]},
        {"attn_implementation": "stranger/kernel"},
        {"transformers_weights": "../elsewhere.safetensors"},
        {"model_type": 3},
    ],
    ids=str,
)
def test_config_of_a_stranger(scratch: Path, change: dict[str, object]) -> None:
    """It is ignored where it is of no use, and refused where it makes no sense; it never raises anything else."""
    config = json.loads((scratch / "config.json").read_text())
    (scratch / "config.json").write_text(json.dumps(config | change))
    with contextlib.suppress(CheckpointError, BlocksError):
        stage = load_stage(Checkpoint.open(str(scratch)), 0, 6, dtype=torch.float32, device=CPU)
        assert stage.end == 6


def load_error(directory: Path, start: int = 0, end: int = 6) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_stage(Checkpoint.open(str(directory)), start, end, dtype=torch.float32, device=CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_shards_are_named_with_their_sizes(scratch: Path) -> None:
    shard = min(shards_of(scratch, 4))
    whole = (scratch / shard).read_bytes()
    (scratch / shard).write_bytes(whole[:-100])
    message = load_error(scratch)
    assert shard in message
    assert f"{len(whole)} bytes are expected" in message
    assert f"{len(whole) - 100} are present" in message
    for broken in (
        b"",
        whole[:20],
        b"\xff" * 50,
        whole[:8] + b"[" * 200_000,
        b"version https://git-lfs.github.com/spec/v1",
    ):
        (scratch / shard).write_bytes(broken)
        assert shard in load_error(scratch)
    (scratch / shard).unlink()
    assert f"lacks the file {shard}" in load_error(scratch)


def test_index_cannot_point_outside(scratch: Path) -> None:
    index = json.loads((scratch / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../secret.safetensors")
    (scratch / INDEX).write_text(json.dumps(index))
    assert "weight_map" in refusal(scratch)


def test_missing_tensors_are_never_made_up(scratch: Path) -> None:
    key = "model.layers.1.self_attn.q_proj.weight"
    for shard in shards_of(scratch, 1):
        tensors = load_file(scratch / shard)
        save_file({name: tensor for name, tensor in tensors.items() if name != key}, scratch / shard)
    message = load_error(scratch)
    assert key in message
    assert "1 tensors" in message
    load_stage(Checkpoint.open(str(scratch)), 2, 6, dtype=torch.float32, device=CPU)


def test_tensors_of_another_shape_are_refused(scratch: Path) -> None:
    key = "model.layers.1.self_attn.q_proj.weight"
    for shard in shards_of(scratch, 1):
        tensors = load_file(scratch / shard)
        if key in tensors:
            save_file(tensors | {key: torch.zeros(3, 5)}, scratch / shard)
    message = load_error(scratch)
    assert key in message
    assert "[3, 5]" in message


def test_block_without_tensors(scratch: Path) -> None:
    index = json.loads((scratch / INDEX).read_text())
    index["weight_map"] = {key: shard for key, shard in index["weight_map"].items() if ".layers.5." not in key}
    (scratch / INDEX).write_text(json.dumps(index))
    assert "names no tensor" in load_error(scratch, 5, 6)
    assert "layers.5" in load_error(scratch, 4, 6)
    with pytest.raises(CheckpointError, match=r"block 5"):
        Checkpoint.open(str(scratch)).block_hash(5)


def test_full_disk_while_the_view_is_made(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "symlink_to", full)
    assert "disk is full" in load_error(single)
