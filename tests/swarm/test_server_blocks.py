"""Blocks that an operator asks for, before anything is measured or told."""

import asyncio
from pathlib import Path

import pytest

from geopetals.credentials.certificate import Role
from geopetals.errors import BlocksError
from geopetals.progress import Silent
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.server import BlockServer
from geopetals.swarm.server_config import ServerConfig
from tests.issuing import Clock, Issuer
from tests.models import save_llama


def test_blocks_that_the_model_does_not_have_are_refused_by_the_server_itself(tmp_path: Path) -> None:
    model = str(save_llama(tmp_path / "model"))
    issuer = Issuer(tmp_path / "state", identity=Checkpoint.open(model).identity(), clock=Clock())
    config = ServerConfig(model=model, token=issuer.token(Role.SERVER), blocks=(20, 22))
    server = BlockServer(config, Silent(), lambda ready: None)
    with pytest.raises(BlocksError, match="blocks 20:22 are no span"):
        asyncio.run(asyncio.wait_for(server.run(asyncio.Event()), 30))
    assert server.close()
