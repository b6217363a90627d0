"""Stock PETALS beside GeoPETALS, for Llama and then for BLOOM. `make interop` makes the environment that this needs."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from geopetals import AutoDistributedModelForCausalLM
from tests.interop import checkpoints
from tests.interop.mixed_swarm import OURS, STOCK, MixedSwarm, mixed_swarm
from tests.interop.stock_processes import PYTHON, StockClient

# The kind of the server that founds the swarm: each is once the one that lets the other in.
FOUNDERS = {"llama": OURS, "bloom": STOCK}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interop: needs stock PETALS in an environment of its own")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.interop)
            item.add_marker(pytest.mark.timeout(300))
            if not PYTHON.exists():
                item.add_marker(pytest.mark.skip("no stock PETALS here: run `make interop`"))


@pytest.fixture(scope="session", params=FOUNDERS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(family, tmp_path_factory.mktemp("models") / family)


@pytest.fixture(scope="session")
def local(model: Path) -> PreTrainedModel:
    """The unmodified model of transformers 5 in this process."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.eval()
    return loaded


@pytest.fixture(scope="session")
def sockets() -> Iterator[Path]:
    """A short path: the name of a Unix socket has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="s-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def stock_client(tmp_path_factory: pytest.TempPathFactory, sockets: Path) -> Iterator[StockClient]:
    client = StockClient(tmp_path_factory.mktemp("stock") / "client", sockets)
    yield client
    client.stop()


@pytest.fixture(scope="session")
def swarm(
    family: str, model: Path, tmp_path_factory: pytest.TempPathFactory, sockets: Path, stock_client: StockClient
) -> Iterator[MixedSwarm]:
    folder = tmp_path_factory.mktemp("swarm")
    with mixed_swarm(
        model, prefix=f"tiny-{family}", founder=FOUNDERS[family], folder=folder, sockets=sockets
    ) as started:
        yield started
        stock_client.do("close")


class OurClients:
    """GeoPETALS models, one for each chain and set of options."""

    def __init__(self, swarm: MixedSwarm) -> None:
        self._swarm = swarm
        self._models: dict[str, Any] = {}

    def on(self, kinds: tuple[str, str], **options: Any) -> Any:
        key = f"{kinds} {options}"
        if key not in self._models:
            options |= self._swarm.client_options(kinds)
            self._models[key] = AutoDistributedModelForCausalLM.from_pretrained(str(self._swarm.model), **options)
        return self._models[key]

    def close(self) -> None:
        for model in self._models.values():
            model.close()


@pytest.fixture(scope="session")
def our_clients(swarm: MixedSwarm) -> Iterator[OurClients]:
    clients = OurClients(swarm)
    yield clients
    clients.close()
