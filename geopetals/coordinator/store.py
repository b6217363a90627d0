"""The coordinator's memory on disk: SQLite in WAL mode, with events, snapshots, history and sessions.

Every change is one transaction, so that a process killed at any instant leaves a state that is whole: the newest
snapshot and the events after it are what the coordinator knew when it last told anybody anything.
"""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from geopetals.coordinator.rows import SessionRow as SessionRow
from geopetals.coordinator.rows import runs_in_order, write_rows
from geopetals.errors import GeoPetalsError

_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE events (number INTEGER PRIMARY KEY, at REAL NOT NULL, body BLOB NOT NULL, actions BLOB NOT NULL)",
        "CREATE TABLE snapshots (number INTEGER PRIMARY KEY, at REAL NOT NULL, body BLOB NOT NULL)",
        "CREATE TABLE history (number INTEGER PRIMARY KEY, at REAL NOT NULL, body TEXT NOT NULL)",
        "CREATE TABLE sessions (id INTEGER PRIMARY KEY, session_id TEXT NOT NULL, client TEXT NOT NULL, "
        "asked_at REAL NOT NULL, body TEXT NOT NULL, measured TEXT)",
        "CREATE INDEX sessions_by_name ON sessions (client, session_id)",
        "CREATE TABLE facts (name TEXT PRIMARY KEY, body BLOB NOT NULL)",
    ),
)
_KEPT_SNAPSHOTS = 3
_KEPT_EVENTS = 500_000
_KEPT_SESSIONS = 200_000
_KEPT_HISTORY = 100_000
_MOST_BYTES = 2**30


class StoreError(GeoPetalsError):
    """The state directory cannot be used."""


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event as it was applied, and what followed: its number counts from 1, `at` is the core's time."""

    number: int
    at: float
    body: dict[str, Any]
    actions: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after event `number`."""

    number: int
    at: float
    body: dict[str, Any]


class Store:
    """One connection to a database, for one thread at a time; there may be others."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError if the file cannot be used, or was written by a newer release."""
        try:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._migrate()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot use the state in {path} ({error}): choose another --state.") from error

    def close(self) -> None:
        self._database.close()

    def fact(self, name: str) -> Any:
        """A value kept by its name; None if there is none."""
        row = self._database.execute("SELECT body FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else msgpack.unpackb(row[0])

    def keep_fact(self, name: str, value: Any) -> None:
        self._database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, msgpack.packb(value)))

    def write(
        self,
        events: Sequence[LoggedEvent],
        history: Sequence[tuple[int, float, dict[str, Any]]] = (),
        sessions: Sequence[SessionRow] = (),
        snapshot: Snapshot | None = None,
    ) -> None:
        """All of it or nothing; it is on the disk when this returns."""
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        try:
            write_rows(
                database,
                "INSERT INTO events VALUES {rows}",
                [(each.number, each.at, msgpack.packb(each.body), msgpack.packb(each.actions)) for each in events],
            )
            write_rows(
                database,
                "INSERT OR REPLACE INTO history VALUES {rows}",
                [(number, at, json.dumps(body)) for number, at, body in history],
            )
            for rows in runs_in_order(sessions):
                self._write_sessions(rows)
            if snapshot is not None:
                self._write_snapshot(snapshot)
            database.execute("COMMIT")
        except BaseException:
            database.execute("ROLLBACK")
            raise

    def latest_snapshot(self) -> Snapshot | None:
        return self._snapshot("SELECT number, at, body FROM snapshots ORDER BY number DESC LIMIT 1")

    def oldest_snapshot(self) -> Snapshot | None:
        return self._snapshot("SELECT number, at, body FROM snapshots ORDER BY number LIMIT 1")

    def _snapshot(self, query: str) -> Snapshot | None:
        row = self._database.execute(query).fetchone()
        return None if row is None else Snapshot(row[0], row[1], msgpack.unpackb(row[2], strict_map_key=False))

    def events(self, *, after: int = 0) -> Iterator[LoggedEvent]:
        rows = self._database.execute(
            "SELECT number, at, body, actions FROM events WHERE number > ? ORDER BY number", (after,)
        )
        for number, at, body, actions in rows:
            yield LoggedEvent(number, at, msgpack.unpackb(body), tuple(msgpack.unpackb(actions)))

    def last_event(self) -> tuple[int, float]:
        """Its number and time; zeros if there is none."""
        number, at = self._database.execute(
            "SELECT number, at FROM events ORDER BY number DESC LIMIT 1"
        ).fetchone() or (
            0,
            0.0,
        )
        return number, at

    def history(self, limit: int) -> list[dict[str, Any]]:
        """The newest entries, oldest first."""
        rows = self._database.execute("SELECT body FROM history ORDER BY number DESC LIMIT ?", (limit,)).fetchall()
        return [json.loads(body) for (body,) in reversed(rows)]

    def sessions(self, limit: int) -> list[dict[str, Any]]:
        """The newest sessions, oldest first, with what was predicted and measured."""
        rows = self._database.execute(
            "SELECT session_id, client, asked_at, body, measured FROM sessions ORDER BY id DESC LIMIT ?", (limit,)
        ).fetchall()
        return [
            {
                "session_id": session_id,
                "client": client,
                "asked_at": asked_at,
                "predicted": json.loads(body),
                "measured": None if measured is None else json.loads(measured),
            }
            for session_id, client, asked_at, body, measured in reversed(rows)
        ]

    def backup(self, target: Path) -> None:
        """A copy that is whole, also while a coordinator writes. Raises StoreError."""
        if target.exists():
            raise StoreError(f"{target} exists: choose another file for the backup.")
        try:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))
            copy = sqlite3.connect(target)
            try:
                self._database.backup(copy)
            finally:
                copy.close()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot write the backup {target} ({error}): choose another file.") from error

    def _write_sessions(self, rows: Sequence[SessionRow]) -> None:
        write_rows(
            self._database,
            "INSERT INTO sessions (session_id, client, asked_at, body) VALUES {rows}",
            [
                (row.session_id, row.client, row.at, json.dumps(row.predicted))
                for row in rows
                if row.predicted is not None
            ],
        )
        write_rows(
            self._database,
            "WITH ended (client, session_id, measured) AS (VALUES {rows}) "
            "UPDATE sessions SET measured = (SELECT ended.measured FROM ended "
            "WHERE ended.client = sessions.client AND ended.session_id = sessions.session_id) "
            "WHERE id IN (SELECT (SELECT max(id) FROM sessions AS named "
            "WHERE named.client = ended.client AND named.session_id = ended.session_id) FROM ended)",
            [(row.client, row.session_id, json.dumps(row.measured)) for row in rows if row.measured is not None],
        )

    def _write_snapshot(self, snapshot: Snapshot) -> None:
        database = self._database
        database.execute(
            "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)",
            (snapshot.number, snapshot.at, msgpack.packb(snapshot.body)),
        )
        database.execute(
            "DELETE FROM snapshots WHERE number NOT IN (SELECT number FROM snapshots ORDER BY number DESC LIMIT ?)",
            (_KEPT_SNAPSHOTS,),
        )
        database.execute("DELETE FROM events WHERE number <= ?", (snapshot.number - _KEPT_EVENTS,))
        database.execute("DELETE FROM sessions WHERE id <= (SELECT max(id) FROM sessions) - ?", (_KEPT_SESSIONS,))
        database.execute("DELETE FROM history WHERE number <= (SELECT max(number) FROM history) - ?", (_KEPT_HISTORY,))
        while self._used_bytes() > _MOST_BYTES and self._drop_oldest():
            pass

    def _used_bytes(self) -> int:
        """What is freed is used again: the file grows no more."""
        names = ("page_count", "freelist_count", "page_size")
        count, free, size = (self._database.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
        return int((count - free) * size)

    def _drop_oldest(self) -> bool:
        """A quarter of the events that no snapshot needs, or of old sessions and history; False: nothing is left."""
        database = self._database
        needed = database.execute("SELECT min(number) FROM snapshots").fetchone()[0]
        tables = (("events", "number", needed), ("sessions", "id", None), ("history", "number", None))
        dropped = 0
        for table, key, most in tables:
            first, last = database.execute(f"SELECT min({key}), max({key}) FROM {table}").fetchone()
            if first is None:
                continue
            upto = first + (last - first) // 4 if most is None else min(first + (last - first) // 4, most)
            dropped += database.execute(f"DELETE FROM {table} WHERE {key} <= ?", (upto,)).rowcount
        return dropped > 0

    def _migrate(self) -> None:
        """The number of migrations that a database has seen is its schema's version."""
        database = self._database
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise StoreError("the state was written by a newer release: update geopetals on this machine.")
        for number, statements in enumerate(_MIGRATIONS[version:], start=version + 1):
            _run_all(database, ("BEGIN IMMEDIATE", *statements, f"PRAGMA user_version = {number}", "COMMIT"))


def _run_all(database: sqlite3.Connection, statements: Iterable[str]) -> None:
    try:
        for statement in statements:
            database.execute(statement)
    except BaseException:
        database.execute("ROLLBACK")
        raise
