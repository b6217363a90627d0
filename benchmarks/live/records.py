"""The files of a scenario: results, rewritten after every run; predictions, a line each, on the disk before it."""

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geopetals.bench.provenance import provenance

Key = tuple[int, str, str]
"""Number of the order of joining, system, load."""


def digest(prediction: Any) -> str:
    """Of the JSON with sorted keys and without spaces."""
    return hashlib.sha256(json.dumps(prediction, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Records:
    """Of one scenario, in a folder. With `resume` it goes on where the files end; else they begin anew."""

    def __init__(self, folder: Path, name: str, *, seed: int, resume: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.predictions_file = folder / f"{name}.json", folder / f"{name}.predictions.jsonl"
        self._seed = seed
        self.setup: dict[str, Any] = {}
        self.runs: list[dict[str, Any]] = []
        if resume and self.file.exists():
            found = json.loads(self.file.read_text())
            self.setup, self.runs = found["setup"], found["runs"]
        elif not resume:
            self.predictions_file.unlink(missing_ok=True)

    def done(self) -> set[Key]:
        return {(run["order"], run["system"], run["load"]) for run in self.runs}

    def predict(self, key: Key, prediction: Mapping[str, Any]) -> str:
        """On the disk when this returns. Gives its SHA-256."""
        sha256 = digest(prediction)
        line = {"key": list(key), "written_at": time.time(), "sha256": sha256, "prediction": prediction}
        with self.predictions_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return sha256

    def add(self, run: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        self.runs.append(dict(run))
        self.write(summary)

    def write(self, summary: Mapping[str, Any]) -> None:
        """All at once: an interrupted run loses nothing of those before."""
        command = shlex.join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])])
        result = {
            "provenance": provenance(command, seed=self._seed),
            "summary": dict(summary),
            "setup": self.setup,
            "runs": self.runs,
        }
        partial = self.file.with_suffix(".json.part")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(self.file)


def read_predictions(file: Path) -> dict[Key, dict[str, Any]]:
    """The newest of each key."""
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    return {(int(line["key"][0]), str(line["key"][1]), str(line["key"][2])): line for line in lines}
