"""Traces of requests: when they came, and how long prompts and answers were."""

import csv
import io
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from geopetals.cluster.errors import ClusterError, shown_value
from geopetals.cluster.kinds import Files, Kind, Schema
from geopetals.problem import Floats, Ints

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests in the order of their arrivals; the first arrives at 0."""

    source: str
    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints

    def __len__(self) -> int:
        return self.arrival_s.size


class TraceFile(Kind):
    """The path of a CSV file in the form of the Azure LLM inference traces."""

    def read(self, value: object, files: Files) -> Trace:
        if not isinstance(value, str):
            raise ClusterError((), f"{shown_value(value)} is no trace: write the path of a CSV file.")
        return parse_trace(files.text(value), source=files.absolute(value))

    def check(self, value: Any) -> None:
        if not isinstance(value, Trace):
            raise ClusterError((), f"{shown_value(value)} is no trace: give a Trace.")

    def write(self, value: Trace) -> str:
        return value.source

    def schema(self) -> Schema:
        return {"type": "string", "examples": ["AzureLLMInferenceTrace_code.csv"]}


def parse_trace(text: str, *, source: str) -> Trace:
    """A line `TIMESTAMP,ContextTokens,GeneratedTokens` for each request; timestamps are dates or seconds.

    Requests that generate nothing or lack a prompt count as one token. Raises ClusterError that names the line.
    """
    reader = csv.DictReader(io.StringIO(text))
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ClusterError((), f"the trace has no column {missing[0]}: give {', '.join(_COLUMNS)}.")
    rows = []
    for row in reader:
        try:
            rows.append((_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])))
        except (TypeError, ValueError):
            raise ClusterError((), f"line {reader.line_num} of the trace is no request: mend or remove it.") from None
    if not rows:
        raise ClusterError((), "the trace has no request: give at least one line.")
    rows.sort(key=lambda row: row[0])
    times, prompts, outputs = zip(*rows, strict=True)
    return Trace(
        source=source,
        arrival_s=np.array(times) - times[0],
        prompt_tokens=np.clip(np.array(prompts, dtype=np.int64), 1, 10**6),
        output_tokens=np.clip(np.array(outputs, dtype=np.int64), 1, 10**6),
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        # Seven digits of the second, as in the published traces: Python reads six.
        date = datetime.fromisoformat(text.strip()[:26])
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    if not np.isfinite(seconds):
        raise ValueError(text)
    return seconds
