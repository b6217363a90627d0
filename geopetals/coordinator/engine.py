"""The core, driven live: the clock, the journal and the process for plans that it has none of itself.

Each event is applied at once and its actions are carried out when the event is on the disk, in order. So whatever a
member has been told is still known after a restart. An event that the core cannot take is refused: the core is made
again from what is on the disk, as if the event had never come.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from geopetals.coordinator import aside
from geopetals.coordinator.core import Core
from geopetals.coordinator.core.actions import Action, Admitted, Explained, MakePlan
from geopetals.coordinator.core.events import (
    Event,
    PlanMade,
    Restarted,
    ServerLeft,
    SessionClosed,
    Tick,
    event_from_dict,
)
from geopetals.coordinator.core.plans import Layout, Plans
from geopetals.coordinator.journal import Entry, Journal
from geopetals.coordinator.store import SessionRow, Snapshot, Store, StoreError
from geopetals.errors import ServerRefused

log = logging.getLogger(__name__)

TICK_S = 0.5
_LEAST_TICK_S = 0.02
_SNAPSHOT_EVENTS = 20_000
_SNAPSHOT_S = 300.0

Clock = Callable[[], float]


class Unfit(ServerRefused):
    """The core cannot take what a member says; nothing has changed."""


class Engine:
    """Feeds events to the core. `now` is Unix time that never goes back, also over restarts.

    `perform` carries out actions, on the event loop; it must not wait. The store is the engine's alone: its thread
    writes to it.
    """

    def __init__(self, core: Core, store: Store, *, clock: Clock) -> None:
        self.core = core
        self.perform: Callable[[Action], None] = _forget
        self._store, self._clock = store, clock
        self._journal = Journal(store)
        self._recovered = False
        self._number = 0
        self._last = 0.0
        self._ahead_s = 0.0
        self._since_snapshot = 0
        self._snapshot_at = clock()
        self._planning: set[asyncio.Task[None]] = set()
        self._unmade: MakePlan | None = None

    @property
    def failed(self) -> "asyncio.Future[None]":
        """Fails when the disk takes no more: the coordinator has to end, since it must not promise anything."""
        return self._journal.failed

    @property
    def events(self) -> int:
        """Events that have been applied since the state was new."""
        return self._number

    @property
    def is_planning(self) -> bool:
        return self._unmade is not None

    def now(self) -> float:
        self._last = max(self._last, self._clock() + self._ahead_s)
        return self._last

    def recover(self) -> int:
        """Bring the core to where it was; returns how many events came after the newest snapshot.

        Raises StoreError for a state that this release cannot read.
        """
        try:
            return self._recover()
        except (KeyError, TypeError, ValueError) as error:
            log.debug("coordinator.not_recovered", exc_info=True)
            raise StoreError(
                f"the coordinator's state cannot be read by this release ({error!r}): go on with the release that "
                "wrote it, or choose another --state."
            ) from error

    def _recover(self) -> int:
        replayed = self._replay()
        self._ahead_s = max(0.0, self._last - self._clock())
        self._recovered = True
        if self._unmade is not None:
            self._start_plan(self._unmade)
        return replayed

    def _replay(self) -> int:
        """Everything that is on the disk, into a new core."""
        snapshot = self._store.latest_snapshot()
        if snapshot is not None:
            self.core.restore(snapshot.body)
            self._number, self._last = snapshot.number, snapshot.at
        replayed = 0
        for logged in self._store.events(after=self._number):
            event = event_from_dict(logged.body)
            self._note_plan(event, self.core.apply(event, logged.at))
            self._number, self._last = logged.number, logged.at
            replayed += 1
        return replayed

    def restarted(self) -> None:
        """To be said once after `recover`, when members can be heard: none of them could be while nobody listened."""
        self.apply(Restarted())

    def apply(self, event: Event) -> bool:
        """Actions follow by `perform` once the event is durable. False: the core cannot take it; nothing follows."""
        return self._add(event, None)

    async def settle(self, event: Event) -> None:
        """The same, and wait until its actions have been carried out. Raises Unfit."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._add(event, done):
            raise Unfit("the coordinator cannot work with this request.")
        await done

    async def run(self) -> None:
        """Tick, and take snapshots, until cancelled."""
        while True:
            await asyncio.sleep(min(max(self.core.next_due_s() - self.now(), _LEAST_TICK_S), TICK_S))
            self.apply(Tick())

    async def close(self) -> None:
        """Write all that is still to be written, and a snapshot."""
        for task in self._planning:
            task.cancel()
        if self._recovered:
            self._add(Restarted(), None, snapshot=True)
        await self._journal.close()

    def _add(self, event: Event, done: "asyncio.Future[None] | None", *, snapshot: bool = False) -> bool:
        now = self.now()
        try:
            actions = self.core.apply(event, now)
        except Exception:
            log.exception("coordinator.event_refused event=%.300s", event)
            self._take_back()
            if isinstance(event, Tick):
                self._drop_newest_server()
            return False
        self._note_plan(event, actions)
        self._number += 1
        entry = Entry(self._number, now, event, actions)
        _note_rows(entry, event, actions, now)
        if self._snapshot_due(now) or snapshot:
            entry.snapshot = self._take_snapshot(now)
        if actions or done is not None:
            entry.then = lambda: self._carry_out(actions, done)
        self._journal.add(entry)
        return True

    def _take_back(self) -> None:
        """Make the core again, for an exception in the middle of an event has left it half changed.

        A snapshot is due at once, so that the next time costs little.
        """
        if not self._journal.flush():
            return
        before, self.core = self.core, Core(self.core.model, self.core.settings)
        try:
            self._number, self._unmade = 0, None
            self._replay()
        except Exception as error:
            log.exception("coordinator.not_taken_back")
            self.core = before
            self._journal.give_up(error)
        self._since_snapshot = _SNAPSHOT_EVENTS

    def _drop_newest_server(self) -> None:
        """When time itself cannot pass any more, what was taken in last is the likeliest reason."""
        newest = next((peer for peer in reversed(self.core.servers) if self.core.hears(peer)), None)
        if newest is not None:
            self._add(ServerLeft(peer=newest), None)

    def _carry_out(self, actions: tuple[Action, ...], done: "asyncio.Future[None] | None") -> None:
        try:
            for action in actions:
                self._carry_out_one(action)
        finally:
            if done is not None and not done.done():
                done.set_result(None)

    def _carry_out_one(self, action: Action) -> None:
        try:
            if isinstance(action, MakePlan):
                self._start_plan(action)
            else:
                self.perform(action)
        except Exception:
            log.exception("coordinator.not_performed action=%.300s", action)

    def _note_plan(self, event: Event, actions: tuple[Action, ...]) -> None:
        """Which plan is still to be made."""
        unmade = self._unmade
        is_made = isinstance(event, PlanMade) and unmade is not None and event.plans.number >= unmade.number
        if is_made or isinstance(event, Restarted):
            self._unmade = None
        for action in actions:
            if isinstance(action, MakePlan):
                self._unmade = action

    def _start_plan(self, action: MakePlan) -> None:
        task = asyncio.create_task(self._plan(action.number))
        self._planning.add(task)
        task.add_done_callback(self._planning.discard)

    async def _plan(self, number: int) -> None:
        job = self.core.plan_job(number)
        if job is None:
            return
        try:
            plans = await aside.plan(job)
        except Exception as error:
            log.exception("coordinator.plan_failed number=%d", number)
            stay = Layout(spans=dict(job.holding), session_s=None)
            why = f"internal error: {type(error).__name__}"
            plans = Plans(number=number, sessions=0, new=None, stay=stay, failed=why)
        self.apply(PlanMade(plans=plans))

    def _snapshot_due(self, now: float) -> bool:
        """Never while a plan is being made: snapshots do not hold what it is made of."""
        self._since_snapshot += 1
        is_old = self._since_snapshot >= _SNAPSHOT_EVENTS or now - self._snapshot_at >= _SNAPSHOT_S
        return is_old and self._unmade is None

    def _take_snapshot(self, now: float) -> Snapshot:
        self._since_snapshot, self._snapshot_at = 0, now
        return Snapshot(self._number, now, self.core.snapshot())


def _note_rows(entry: Entry, event: Event, actions: tuple[Action, ...], now: float) -> None:
    for action in actions:
        if isinstance(action, Explained):
            entry.history.append((action.number, action.at_s, history_entry(action)))
        elif isinstance(action, Admitted):
            predicted = {**action.predicted.to_dict(), "chain": [list(hop) for hop in action.chain]}
            entry.sessions.append(SessionRow(action.client, action.session_id, now, predicted=predicted))
    if isinstance(event, SessionClosed):
        measured = event.measured.to_dict()
        entry.sessions.append(SessionRow(event.client, event.session_id, now, measured=measured))


def _forget(action: Action) -> None:
    """Before somebody is there to carry actions out."""


def history_entry(action: Explained) -> dict[str, Any]:
    """An explained decision as people and programs read it."""
    return {
        "number": action.number,
        "at": action.at_s,
        "what": action.what,
        "why": action.why,
        "predicted": json.loads(action.predicted),
        "replaced": json.loads(action.replaced),
    }
