"""Recorded arrivals: Azure's public LLM inference traces, or any CSV of arrival time, prompt and output tokens."""

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from geopetals.errors import UnsupportedInput

# Azure: https://github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_{code,conv}.csv and those of 2024.
_COLUMNS = {
    "arrival": ("arrival_s", "TIMESTAMP", "timestamp"),
    "prompt": ("prompt_tokens", "ContextTokens", "context_tokens"),
    "output": ("output_tokens", "GeneratedTokens", "generated_tokens"),
}
_MOST_ROWS = 1_000_000
_MOST_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """One request; `arrival_s` counts from the first of the trace."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path, *, speed: float = 1.0, max_tokens: int | None = None) -> list[TraceRow]:
    """The rows in order of arrival, `speed` times as fast as recorded; those longer than `max_tokens` are left out.

    Raises UnsupportedInput with the line that is wrong.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = _parse(csv.DictReader(file), str(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnsupportedInput(f"{path} cannot be read as CSV ({error}): check the file.") from error
    fitting = [row for row in rows if max_tokens is None or row[1] + row[2] <= max_tokens]
    if not fitting:
        raise UnsupportedInput(f"{path} has no request{' that is short enough' if rows else ''}: check the file.")
    first_s = min(row[0] for row in fitting)
    return [
        TraceRow(arrival_s=(at_s - first_s) / speed, prompt_tokens=prompt, output_tokens=output)
        for at_s, prompt, output in sorted(fitting)
    ]


def _parse(reader: "csv.DictReader[str]", name: str) -> list[tuple[float, int, int]]:
    found = {
        what: next((column for column in names if column in (reader.fieldnames or ())), None)
        for what, names in _COLUMNS.items()
    }
    if missing := [_COLUMNS[what][0] for what, column in found.items() if column is None]:
        raise UnsupportedInput(f"{name} has no column {', '.join(missing)}: name the columns in its first line.")
    rows: list[tuple[float, int, int]] = []
    for row in reader:
        if len(rows) >= _MOST_ROWS:
            raise UnsupportedInput(f"{name} has more than {_MOST_ROWS} rows: cut it.")
        try:
            at_s = _seconds(row[found["arrival"] or ""])
            prompt, output = (int(row[found[what] or ""]) for what in ("prompt", "output"))
        except (ValueError, TypeError) as error:
            raise UnsupportedInput(f"{name}, line {reader.line_num}: {error}.") from error
        if not (0 <= prompt <= _MOST_TOKENS and 0 <= output <= _MOST_TOKENS and abs(at_s) < 1e12):
            raise UnsupportedInput(f"{name}, line {reader.line_num}: a figure is out of range.")
        rows.append((at_s, max(prompt, 1), max(output, 1)))
    return rows


def _seconds(text: str) -> float:
    """A number of seconds, or a date and time; Azure's have seven digits after the point, Python reads six."""
    try:
        return float(text)
    except ValueError:
        pass
    whole, _, rest = text.strip().partition(".")
    fraction = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    moment = datetime.fromisoformat(whole + rest[len(fraction) :])
    return moment.timestamp() + float(f"0.{fraction or 0}")
