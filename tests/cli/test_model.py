import json
from pathlib import Path

import pytest

from geopetals import cli
from geopetals.cli import logs


@pytest.fixture(autouse=True)
def environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands quieten other libraries by way of the environment, which later tests would inherit."""
    monkeypatch.setattr(logs, "configure", lambda args: None)


def test_it_prints_memory_per_block_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["model", "llama-3-70b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama-3-70b (llama): 80 blocks, 70.554 billion parameters, 855.7 million per block"
    assert "8 key-value heads of 128, 4.1 kB per token and block (bfloat16)" in lines[2]
    nf4 = next(line for line in lines if line.startswith("nf4"))
    assert nf4.split() == ["nf4", "481.3", "MB", "38.5", "GB", "16", "33", "49", "80"]


def test_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["model", "BLOOM-176b", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)
    assert model["parameters"]["total"] == 176_247_271_424
    assert model["kv_bytes_per_token_per_block"]["float16"] == 4 * 14336
    assert model["weights"]["bfloat16"]["block_bytes"] == 2 * model["parameters"]["block"]


def test_a_config_is_read_from_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["model", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"{tmp_path.name} (qwen3_moe): 2 blocks")
    assert "mixture of experts" in output


@pytest.mark.parametrize("model", ["llama-3-9b", "", "no/where/at/all", "\x00", "~nobody/model", "x" * 5000])
def test_an_unknown_model_is_one_sentence(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["model", model]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "there is no model and no file" in output.err or "cannot be read" in output.err
