"""What every benchmark writes down beside its figures."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

_PACKAGES = ("geopetals", "petals", "torch", "transformers", "hivemind")


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """`name_p50`, `_p90`, `_p99` and `_n`."""
    figures = {f"{name}_p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return {**figures, f"{name}_n": len(values)}


def write_results(out: Path, *, summary: dict[str, float], runs: list[dict[str, Any]], seed: int | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"provenance": _provenance(seed), "summary": summary, "runs": runs}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def _provenance(seed: int | None) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])]),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "load_average": os.getloadavg(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
