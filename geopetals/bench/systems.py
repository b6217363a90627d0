"""How to start a client of either system on a host."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geopetals
from geopetals.bench.workers import WorkerSpec
from geopetals.errors import UnsupportedInput

GEOPETALS, STOCK = "geopetals", "stock"
_CHECKOUT = Path(geopetals.__file__).parents[1]
STOCK_SCRIPTS = _CHECKOUT / "benchmarks" / "stock"
STOCK_PYTHON = _CHECKOUT / ".venv-stock" / "bin" / "python"


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemUnderTest:
    """One swarm and which clients ask it. `options` are fields of that system's ClientConfig."""

    system: str
    model: str
    initial_peers: tuple[str, ...]
    swarm: str
    stock_python: Path = STOCK_PYTHON
    options: Mapping[str, Any] = field(default_factory=dict)

    def worker(self, host: str, prefix: Sequence[str] = ()) -> WorkerSpec:
        """The client of a host, started by `prefix` and then its own command."""
        config = {
            "model": self.model,
            "initial_peers": list(self.initial_peers),
            "dht_prefix": self.swarm,
            "options": dict(self.options),
        }
        if self.system == GEOPETALS:
            command = [sys.executable, "-m", "geopetals.bench.worker"]
            return WorkerSpec(host=host, command=[*prefix, *command], config=config, environment=_environment)
        require_stock(self.stock_python)
        command = [str(self.stock_python), str(STOCK_SCRIPTS / "client.py")]
        return WorkerSpec(host=host, command=[*prefix, *command], config=config, environment=stock_environment)


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}


def stock_environment(folder: Path) -> dict[str, str]:
    """For a process that runs stock PETALS offline, with all its files in `folder`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "PETALS_"))}
    return kept | {
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PETALS_CACHE": str(folder),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(folder),
    }


def require_stock(python: Path = STOCK_PYTHON) -> None:
    """Raises UnsupportedInput where stock PETALS cannot be run."""
    if not python.exists() or not STOCK_SCRIPTS.exists():
        raise UnsupportedInput(
            f"stock PETALS is not at {python}: run `make stock` in a checkout of GeoPETALS, and geopetals from there."
        )
