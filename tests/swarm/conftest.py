from pathlib import Path

import pytest
import torch

from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.stage import Stage, load_stage
from tests.models import save_llama
from tests.swarm.handler_rig import HELD


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The middle blocks of a tiny Llama, for handlers."""
    directory: Path = save_llama(tmp_path_factory.mktemp("handler"))
    checkpoint = Checkpoint.open(str(directory))
    return load_stage(checkpoint, HELD.start, HELD.stop, dtype=torch.float32, device=torch.device("cpu"))
