"""Events on their way to the disk, and actions that wait until what caused them is there.

A thread writes everything that has come since its last transaction in one: the more there is to do, the more share one
sync of the disk.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from geopetals.coordinator.core.actions import Action, action_to_dict
from geopetals.coordinator.core.events import Event, event_to_dict
from geopetals.coordinator.store import LoggedEvent, SessionRow, Snapshot, Store

log = logging.getLogger(__name__)

_LINGER_S = 0.5
"""Entries that nobody waits for are written with the next one, or after so long."""


@dataclass(slots=True)
class Entry:
    """One event with what came of it. `then` is called on the event loop once the event is durable."""

    number: int
    at: float
    event: Event
    actions: tuple[Action, ...] = ()
    history: list[tuple[int, float, dict[str, Any]]] = field(default_factory=list)
    sessions: list[SessionRow] = field(default_factory=list)
    snapshot: Snapshot | None = None
    then: Callable[[], None] | None = None


class Journal:
    """Writes entries in order, in a thread of its own. `failed` holds the error once the disk takes no more."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._entries: queue.SimpleQueue[Entry | threading.Event | None] = queue.SimpleQueue()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="geopetals-journal", daemon=True)
        self._thread.start()

    def add(self, entry: Entry) -> None:
        self._entries.put(entry)

    def flush(self) -> bool:
        """Wait until all is on the disk; the store may be read until the next entry. False: the disk takes no more."""
        written = threading.Event()
        self._entries.put(written)
        while not written.wait(_LINGER_S):
            if not self._thread.is_alive():
                return False
        return True

    def give_up(self, error: Exception) -> None:
        """End the coordinator: what is on the disk cannot be gone on with."""
        self._fail(error)

    async def close(self) -> None:
        """Write what is there, and end."""
        self._entries.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            batch, end = self._gather()
            is_last = end is None
            if batch and not self._try_to_write(batch):
                return
            if isinstance(end, threading.Event):
                end.set()

    def _try_to_write(self, batch: list[Entry]) -> bool:
        try:
            self._write(batch)
        except Exception as error:
            log.exception("journal.failed")
            self._tell(self._fail, error)
            return False
        calls = [entry.then for entry in batch if entry.then is not None]
        if calls:
            self._tell(_call_all, calls)
        return True

    def _gather(self) -> tuple[list[Entry], "Entry | threading.Event | None"]:
        """Everything there is, once somebody waits for it or the first has lingered, and what ended it: the last entry,
        an event to set when all is written, or None if nothing comes any more.
        """
        entry = self._entries.get()
        batch: list[Entry] = []
        until = time.monotonic() + _LINGER_S
        while isinstance(entry, Entry):
            batch.append(entry)
            if entry.then is not None:
                until = 0.0
            try:
                entry = self._entries.get(timeout=max(until - time.monotonic(), 0.0))
            except queue.Empty:
                break
        return batch, entry

    def _write(self, batch: list[Entry]) -> None:
        self._store.write(
            [_logged(entry) for entry in batch],
            [row for entry in batch for row in entry.history],
            [row for entry in batch for row in entry.sessions],
            next((entry.snapshot for entry in reversed(batch) if entry.snapshot is not None), None),
        )

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *args)

    def _fail(self, error: Exception) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)


def _logged(entry: Entry) -> LoggedEvent:
    actions = tuple(map(action_to_dict, entry.actions))
    return LoggedEvent(entry.number, entry.at, event_to_dict(entry.event), actions)


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        try:
            call()
        except Exception:
            log.exception("journal.action_failed")
