import errno
from pathlib import Path

import pytest
import torch

from geopetals.client.hollow import load_client
from geopetals.errors import CheckpointError
from geopetals.swarm import model_files
from geopetals.swarm.checkpoint import INDEX, Checkpoint
from geopetals.swarm.stage import load_stage
from tests.hub import COMMIT, FakeHub, serving
from tests.models import save_llama

CPU = torch.device("cpu")
REPO = "people/tiny"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("hub"), sharded=True)


def refusal(model: str, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(model, revision=revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_needed_files_are_downloaded(directory: Path, tmp_path: Path) -> None:
    with serving(FakeHub(REPO, directory), tmp_path) as hub:
        checkpoint = Checkpoint.open(REPO)
        assert checkpoint.block_bytes(torch.float32) == Checkpoint.open(str(directory)).block_bytes(torch.float32)
        assert hub.downloads == ["config.json", INDEX]
        with checkpoint.view(lambda key: ".layers.3." in key) as view:
            needed = {path.resolve().name for path in view.glob("*.safetensors")}
        load_stage(checkpoint, 3, 4, dtype=torch.float32, device=CPU)
        assert len(needed) == len([name for name in hub.downloads if name.endswith(".safetensors")]) < 4
        load_client(checkpoint, dtype=torch.float32, device=CPU)
        assert len(hub.downloads) == len(set(hub.downloads))


def test_commit_and_fingerprint(directory: Path, tmp_path: Path) -> None:
    local = Checkpoint.open(str(directory)).identity()
    with serving(FakeHub(REPO, directory), tmp_path):
        checkpoint = Checkpoint.open(REPO, revision="main")
        assert (checkpoint.revision, checkpoint.identity().model) == (COMMIT, "tiny")
        assert checkpoint.identity().fingerprint is None
        load_stage(checkpoint, 0, 6, dtype=torch.float32, device=CPU)
        load_client(checkpoint, dtype=torch.float32, device=CPU)
        assert checkpoint.identity().fingerprint == local.fingerprint
        assert checkpoint.identity().conflict(local) is None
        assert checkpoint.tokenizer()("a").input_ids


def test_cache_serves_without_network(directory: Path, tmp_path: Path) -> None:
    hub = FakeHub(REPO, directory)
    with serving(hub, tmp_path):
        load_stage(Checkpoint.open(REPO), 0, 6, dtype=torch.float32, device=CPU)
        snapshot = tmp_path / f"models--{REPO.replace('/', '--')}" / "snapshots" / COMMIT
        assert Checkpoint.open(str(snapshot)).identity().revision == COMMIT
        assert Checkpoint.open(str(snapshot)).identity().model == "tiny"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_files.HfApi, "model_info", _unreachable)
            offline = Checkpoint.open(REPO)
            assert offline.revision == COMMIT
            load_stage(offline, 0, 6, dtype=torch.float32, device=CPU)


def _unreachable(*args: object, **kwargs: object) -> None:
    raise ConnectionError("no route")


def test_refusals_of_the_hub(directory: Path, tmp_path: Path) -> None:
    with serving(FakeHub(REPO, directory), tmp_path):
        assert "no revision v9" in refusal(REPO, "v9")
        assert "no public model" in refusal("people/other")


def test_broken_download_can_be_continued(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serving(FakeHub(REPO, directory), tmp_path) as hub:
        checkpoint = Checkpoint.open(REPO)
        hub.cut = {path.name for path in directory.glob("*.safetensors")}
        with pytest.raises(CheckpointError, match=r"could not be downloaded .* run the command again"):
            load_stage(checkpoint, 0, 6, dtype=torch.float32, device=CPU)
        hub.cut = set()
        load_stage(checkpoint, 0, 6, dtype=torch.float32, device=CPU)


def test_file_that_vanished_from_the_hub(directory: Path, tmp_path: Path) -> None:
    hub = FakeHub(REPO, save_llama(tmp_path / "model", sharded=True))
    with serving(hub, tmp_path / "cache"):
        checkpoint = Checkpoint.open(REPO)
        for shard in hub.directory.glob("*.safetensors"):
            shard.unlink()
        with pytest.raises(CheckpointError, match=r"lacks the file model-00001"):
            load_stage(checkpoint, 0, 6, dtype=torch.float32, device=CPU)


def test_full_disk_while_downloading(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(FakeHub(REPO, directory), tmp_path):
        checkpoint = Checkpoint.open(REPO)

        def full(*args: object, **kwargs: object) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(model_files, "hf_hub_download", full)
        with pytest.raises(CheckpointError, match=r"disk is full"):
            load_stage(checkpoint, 0, 6, dtype=torch.float32, device=CPU)
