"""Who fetches weights is told their licence."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from geopetals.progress import Advance, Silent
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.licence import stated_licence
from geopetals.swarm.stage import load_stage
from tests.hub import FakeHub, serving
from tests.models import save_llama


class Kept(Silent):
    def __init__(self) -> None:
        self.tasks: list[str] = []

    def task(self, text: str, *, total: int, unit: str = "bytes") -> contextlib.AbstractContextManager[Advance]:
        self.tasks.append(text)
        return super().task(text, total=total, unit=unit)


@pytest.mark.parametrize(
    ("tags", "card", "expected"),
    [
        (["text-generation", "license:apache-2.0"], {}, "apache-2.0"),
        ([], {"license": "mit"}, "mit"),
        ([], {"license": ["mit", "bsd"]}, "mit"),
        (["license:other"], {"license": "other", "license_name": "qwen-research"}, "qwen-research"),
        (["license:other"], {"license": "other"}, "other"),
        ([], {}, None),
        (None, None, None),
        (["license:\x1b[2Jmit"], {}, None),
        (["license:" + "x" * 1000], {}, None),
        ([5, None], {"license": {"a": 1}}, None),
    ],
)
def test_the_licence_is_the_one_that_the_card_states(tags: Any, card: Any, expected: str | None) -> None:
    assert stated_licence(SimpleNamespace(tags=tags, card_data=card)) == expected


@pytest.mark.parametrize(
    ("card", "words"), [({"license": "llama3.3"}, "licence: llama3.3"), ({}, "licence: not stated")]
)
def test_a_download_of_weights_says_their_licence(card: dict[str, object], words: str, tmp_path: Path) -> None:
    hub = FakeHub("people/tiny", save_llama(tmp_path / "model"))
    hub.card = card
    kept = Kept()
    with serving(hub, tmp_path / "cache"):
        checkpoint = Checkpoint.open(hub.repo, reporter=kept)
        load_stage(checkpoint, 0, 1, dtype=torch.float32, device=torch.device("cpu"))
        assert f"downloading model.safetensors of people/tiny ({words})" in kept.tasks
        assert "downloading config.json" in kept.tasks
        kept.tasks.clear()
        load_stage(checkpoint, 0, 1, dtype=torch.float32, device=torch.device("cpu"))
        assert kept.tasks == []
