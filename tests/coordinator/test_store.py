"""What the coordinator keeps: whole after any end, in order, and readable by later releases only."""

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from geopetals.coordinator.core.actions import MakePlan
from geopetals.coordinator.core.events import Tick
from geopetals.coordinator.journal import Entry, Journal
from geopetals.coordinator.store import LoggedEvent, SessionRow, Snapshot, Store, StoreError
from tests.event_loop import in_loop


def event(number: int) -> LoggedEvent:
    return LoggedEvent(number, 100.0 + number, {"kind": "Tick", "value": [number, b"x", None]}, ({"kind": "MakePlan"},))


def entry(number: int, then: Callable[[], None]) -> Entry:
    return Entry(number, 100.0 + number, Tick(), (MakePlan(number=number),), then=then)


def test_what_was_written_is_there_after_opening_it_again(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.db"
    store = Store(path)
    row = SessionRow("client", "s", 101.0, predicted={"ttft_s": 0.5})
    store.write([event(1), event(2)], [(1, 101.0, {"what": "plan"})], [row], Snapshot(1, 101.0, {"a": {"b": 1}}))
    store.write([event(3)], sessions=[SessionRow("client", "s", 103.0, measured={"ttft_s": 0.6})])
    store.keep_fact("port", 1234)
    store.close()
    again = Store(path)
    assert again.latest_snapshot() == Snapshot(1, 101.0, {"a": {"b": 1}})
    assert list(again.events(after=1)) == [event(2), event(3)]
    assert again.history(10) == [{"what": "plan"}]
    assert again.fact("port") == 1234
    (session,) = again.sessions(10)
    assert session["predicted"] == {"ttft_s": 0.5}
    assert session["measured"] == {"ttft_s": 0.6}
    again.close()


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    Store(tmp_path / "coordinator.db").close()
    assert stat.S_IMODE((tmp_path / "coordinator.db").stat().st_mode) == 0o600


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "coordinator.db")
    store.write([event(1)])
    with pytest.raises(sqlite3.IntegrityError):
        store.write([event(2), event(1)])
    assert [logged.number for logged in store.events()] == [1]
    store.write([event(2)])
    store.close()


def test_a_state_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.db"
    Store(path).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 1000")
    database.close()
    with pytest.raises(StoreError, match="newer release"):
        Store(path)


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.db"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(StoreError, match="cannot use the state"):
        Store(path)


def test_a_backup_is_a_whole_copy_and_overwrites_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "coordinator.db")
    store.write([event(1)])
    store.backup(tmp_path / "copy.db")
    store.write([event(2)])
    copy = Store(tmp_path / "copy.db")
    assert [logged.number for logged in copy.events()] == [1]
    copy.close()
    with pytest.raises(StoreError, match="exists"):
        store.backup(tmp_path / "copy.db")
    store.close()


@in_loop
async def test_actions_follow_their_events_to_the_disk_in_order(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.db"
    store, reader = Store(path), Store(path)
    journal = Journal(store)
    seen: list[tuple[int, bool]] = []
    done = asyncio.Event()

    def then(number: int) -> None:
        seen.append((number, reader.last_event()[0] >= number))
        if number == 300:
            done.set()

    for number in range(1, 301):
        journal.add(entry(number, lambda number=number: then(number)))  # type: ignore[misc]
    await asyncio.wait_for(done.wait(), 30)
    assert seen == [(number, True) for number in range(1, 301)]
    await journal.close()
    store.close()
    reader.close()


@in_loop
async def test_a_journal_that_cannot_write_says_so_and_lets_nothing_out(tmp_path: Path) -> None:
    store = Store(tmp_path / "coordinator.db")
    journal = Journal(store)
    told: list[int] = []
    journal.add(entry(1, lambda: told.append(1)))
    journal.add(entry(1, lambda: told.append(2)))
    with pytest.raises(sqlite3.IntegrityError):
        await asyncio.wait_for(journal.failed, 30)
    assert 2 not in told
    await journal.close()
    store.close()


WRITER = """
import sys
from pathlib import Path
from geopetals.coordinator.store import LoggedEvent, Snapshot, Store
store = Store(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    snapshot = Snapshot(number, 0.0, {"sum": number}) if number % 7 == 0 else None
    store.write([LoggedEvent(number, 0.0, {"n": number})], [(number, 0.0, {"n": number})], snapshot=snapshot)
    print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_has_kept_what_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.db"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    deadline = time.monotonic() + 60
    reported = 0
    while reported < 50 and time.monotonic() < deadline:
        reported = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    reported = max([reported, *(int(line) for line in process.stdout.read().split("\n") if line.strip().isdigit())])
    process.wait()
    process.stdout.close()
    store = Store(path)
    numbers = [logged.number for logged in store.events()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= reported >= 50
    assert [entry["n"] for entry in store.history(1000)] == numbers
    snapshot = store.latest_snapshot()
    assert snapshot is not None
    assert snapshot.body == {"sum": len(numbers) // 7 * 7}
    store.close()


@in_loop
async def test_entries_that_nobody_waits_for_do_not_hold_each_other_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geopetals.coordinator.journal._LINGER_S", 0.2)
    store, reader = Store(tmp_path / "coordinator.db"), Store(tmp_path / "coordinator.db")
    journal = Journal(store)
    end, number = time.monotonic() + 30, 0
    while reader.last_event()[0] == 0:
        assert time.monotonic() < end, "they wait for a pause that never comes"
        number += 1
        journal.add(Entry(number, float(number), Tick()))
        await asyncio.sleep(0.01)
    assert journal.flush()
    assert reader.last_event()[0] == number
    await journal.close()
    store.close()
    reader.close()


def test_the_disk_is_not_filled_and_what_a_snapshot_needs_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geopetals.coordinator.store._MOST_BYTES", 2_000_000)
    path = tmp_path / "coordinator.db"
    store = Store(path)
    for number in range(1, 201):
        event = LoggedEvent(number, 0.0, {"kind": "Tick", "junk": b"x" * 50_000})
        history = (number, 0.0, {"junk": "y" * 5_000})
        store.write([event], [history], snapshot=Snapshot(number, 0.0, {}) if number % 4 == 0 else None)
    kept = [logged.number for logged in store.events()]
    assert kept == list(range(kept[0], 201))
    oldest = store.oldest_snapshot()
    assert oldest is not None
    assert kept[0] <= oldest.number + 1
    assert len(kept) < 60
    assert len(store.history(1000)) < 200
    store.close()
    assert path.stat().st_size < 5_000_000
