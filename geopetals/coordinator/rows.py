"""Many rows in few statements, and what is written of sessions."""

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_ROWS_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class SessionRow:
    """What was predicted for a session, or, with `measured`, what became of it."""

    client: str
    session_id: str
    at: float
    predicted: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None


def write_rows(database: sqlite3.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """In few statements: each lets go of the interpreter, and may have to wait until the event loop is idle again."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        marks = ", ".join([f"({', '.join('?' * len(part[0]))})"] * len(part))
        database.execute(statement.format(rows=marks), [value for row in part for value in row])


def runs_in_order(rows: Sequence[SessionRow]) -> Iterator[list[SessionRow]]:
    """Runs of rows of which those with predictions may be written first: what is measured is the newest session's of
    its name, and names may be used again.
    """
    run: list[SessionRow] = []
    ended: set[tuple[str, str]] = set()
    for row in rows:
        name = (row.client, row.session_id)
        if row.predicted is not None and name in ended:
            yield run
            run, ended = [], set()
        run.append(row)
        if row.measured is not None:
            ended.add(name)
    yield run
