"""What every benchmark writes down beside its figures."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geopetals.bench.provenance import provenance


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """`name_p50`, `_p90`, `_p99` and `_n`."""
    figures = {f"{name}_p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return {**figures, f"{name}_n": len(values)}


def write_results(out: Path, *, summary: dict[str, float], runs: list[dict[str, Any]], seed: int | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])])
    result = {"provenance": provenance(command, seed=seed), "summary": summary, "runs": runs}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
