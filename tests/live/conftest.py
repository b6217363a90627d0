"""Tiny models, their local counterparts, swarms that several tests share, and commands that are ended after a test."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from geopetals import AutoDistributedModelForCausalLM
from geopetals.cache import cache_directory
from geopetals.progress import Silent
from geopetals.swarm import smollm2
from geopetals.swarm.local import LocalSwarm
from tests.live.commands import Command
from tests.models import save_llama

# The second server is entered at block 3, in the middle of its span.
TWO_STAGES = [(0, 3), (2, 6)]
# So are the second and the third.
THREE_STAGES = [(0, 2), (1, 4), (3, 6)]

# A shell that runs the tests in the background has them ignore Ctrl-C, and their children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

StartCommand = Callable[..., Command]
Connect = Callable[..., Any]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks in one file."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def sharded_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, a shard for each block."""
    return save_llama(tmp_path_factory.mktemp("sharded") / "llama", sharded=True)


@pytest.fixture(scope="session")
def retrained_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture, other weights."""
    return save_llama(tmp_path_factory.mktemp("retrained") / "llama", seed=1)


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model."""
    return save_llama(tmp_path_factory.mktemp("small") / "llama", layers=2)


def load_local(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The unmodified model in this process."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval()


@pytest.fixture(scope="session")
def local(llama: Path) -> PreTrainedModel:
    return load_local(llama)


@pytest.fixture(scope="session")
def two_stages(llama: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(str(llama)) as swarm:
        yield swarm.start(spans=TWO_STAGES)


@pytest.fixture(scope="session")
def three_stages(sharded_llama: Path) -> Iterator[LocalSwarm]:
    """Served from a sharded checkpoint; clients open the single file."""
    with LocalSwarm(str(sharded_llama)) as swarm:
        yield swarm.start(spans=THREE_STAGES)


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Opens models in swarms and closes them after the test."""
    with contextlib.ExitStack() as stack:

        def open_model(*arguments: Any, **options: Any) -> Any:
            model = AutoDistributedModelForCausalLM.from_pretrained(*arguments, **options)
            stack.callback(model.close)
            return model

        yield open_model


@pytest.fixture
def start_command() -> Iterator[StartCommand]:
    """Starts commands and ends, after the test, what is left of them."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str | Path, **options: Any) -> Command:
            command = Command(*arguments, **options)
            stack.callback(command.destroy)
            return command

        yield start


@pytest.fixture(scope="session")
def smollm2_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A value for GEOPETALS_CACHE that holds the demo's model: this user's cache if it is there, else made once."""
    cache = cache_directory()
    if not smollm2._is_complete(cache / "models" / smollm2.NAME):
        cache = tmp_path_factory.mktemp("cache")
        smollm2.demo_model_directory(Silent(), cache_dir=cache)
    return cache
