"""Discrete events: sessions arrive, wait, run, lose servers and end; servers fail and join. Pure: no clock, no I/O.

At equal times sessions end first, then servers go and come, then sessions start and try again, then others arrive.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from geopetals.plan import Span
from geopetals.problem import Floats, Ints, Problem
from geopetals.simulation.admission import Admission
from geopetals.simulation.agenda import Agenda, Kind, Outage
from geopetals.simulation.memory import Memory
from geopetals.simulation.policies import Desk
from geopetals.simulation.result import Fate, Log
from geopetals.simulation.running import Running
from geopetals.simulation.service import Alone, Contended, Service
from geopetals.simulation.sessions import Sessions
from geopetals.simulation.timeline import Source, Timeline
from geopetals.simulation.world import SessionTimes, World

_EVERY = 256
"""Arrivals between two reports of progress."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Course:
    """What is given to the engine beside the desk."""

    world: World
    problem: Problem
    """The world's, in the unit of cache in which sessions are counted."""
    sessions: Sessions
    contention: bool = False
    warm_up: int = 0
    max_wait_s: float | None = None
    until_s: float = float("inf")
    outages: tuple[Outage, ...] = ()
    join: Callable[[int], tuple[Span | None, int]] | None = None
    """For a server that comes: what it takes, if it has no blocks, and its cache slots then."""


class Engine:
    """One run."""

    def __init__(self, course: Course, desk: Desk, advance: Callable[[int], None] | None = None) -> None:
        self._course, self._desk, self._state, self._report = course, desk, desk.state, advance
        times = SessionTimes(course.world, desk.objective)
        self._service: Service = (
            Contended(course.problem, times, batched=desk.batches)
            if course.contention
            else Alone(course.problem, times)
        )
        self._memory = Memory(ledger.slots for ledger in desk.state.ledgers)
        self._agenda = Agenda()
        self._admission = Admission(
            desk,
            self._memory,
            self._agenda,
            times,
            exact=self._service.exact,
            max_wait_s=course.max_wait_s,
            begin=self._begin,
            refuse=self._refuse,
        )
        self._timeline = Timeline(
            Source(self._service.next_s, self._done),
            Source(self._agenda.next_s, self._happen),
            Source(self._next_arrival_s, self._let_arrive),
        )
        self._arrivals_s: list[float] = [*course.sessions.arrival_s.tolist(), float("inf")]
        self._arrived = 0
        self._present: dict[int, Running] = {}
        self._pauses_s: list[float] = []
        self.max_concurrent = 0
        self.log = _empty_log(course)
        self._slots = _slots_per_block(course, self.log)

    @property
    def now(self) -> float:
        return self._timeline.now

    def run(self) -> None:
        """To the end of all sessions, or until the clock stops."""
        self._measure(self._arrivals_s)
        for outage in self._course.outages:
            self._agenda.add_outage(outage)
        while self._next_arrival_s() < float("inf") or self._present:
            if not self._timeline.advance(self._course.until_s):
                break
        self._stop()

    def memory_use(self) -> Floats:
        """(J,): see Result."""
        return np.where(self._state.placement.held > 0, self._memory.use(), np.nan)

    def compute_use(self) -> Floats:
        """(J,): see Result."""
        return self._service.compute_use()

    def intervals(self) -> tuple[Floats, Floats]:
        """Between tokens of measured sessions, pauses by the loss of servers among them, and how many of each."""
        values_s, weights = self._service.intervals()
        pauses_s = np.array(self._pauses_s)
        return np.concatenate([values_s, pauses_s]), np.concatenate([weights, np.ones(pauses_s.size)])

    def check(self) -> None:
        """Raises ValueError unless no server holds more than it has, and what is held is what sessions hold."""
        used = [0] * len(self._memory.slots)
        for running in self._present.values():
            if running.started:
                for hop in running.chain:
                    used[hop.server] += hop.blocks * running.slots
        if used != self._memory.used or any(u > s for u, s in zip(used, self._memory.slots, strict=True)):
            raise ValueError(f"caches held {self._memory.used}, by sessions {used}, of {self._memory.slots}")

    def _measure(self, arrivals: list[float]) -> None:
        course = self._course
        last = len(arrivals) - 2
        window = (arrivals[min(course.warm_up, last)], min(arrivals[last], course.until_s))
        self._memory.measure(*window)
        self._service.measure(*window, course.warm_up)

    def _next_arrival_s(self) -> float:
        return self._arrivals_s[self._arrived]

    def _let_arrive(self) -> None:
        self._arrive(self._arrived)
        self._arrived += 1

    def _arrive(self, number: int) -> None:
        running = Running(
            number=number,
            client=int(self.log.client[number]),
            prompt=0 if self._slots is None else int(self.log.prompt_tokens[number]),
            output=int(self.log.output_tokens[number]),
            slots=1 if self._slots is None else int(self._slots[number]),
            arrival_s=self.now,
            attempted_s=self.now,
        )
        self._present[number] = running
        self._admission.attempt(running, self.now)
        self.max_concurrent = max(self.max_concurrent, len(self._present))
        if self._report is not None and (number + 1) % _EVERY == 0:
            self._report(_EVERY)

    def _happen(self) -> None:
        event = self._agenda.pop()
        if event is None:
            return
        kind, what = event
        if isinstance(what, Outage):
            self._down(what.server) if what.down else self._up(what.server)
        elif kind == Kind.OVERDUE:
            self._admission.overdue(what, self.now, self._service.end_s)
        elif kind == Kind.START:
            self._admission.start(what, self.now)
        else:
            self._admission.attempt(what, self.now)

    def _begin(self, running: Running, now: float) -> None:
        number, route = running.number, running.booked.route
        if not running.replays:
            self.log.start_s[number], self.log.wait_s[number] = now, now - running.arrival_s
            self.log.cost_s[number] = route.cost_s
        self.log.chains[number] = route.chain
        self._service.begin(running, now, 0.0 if running.replays else self._desk.constant_s)

    def _done(self) -> None:
        running = self._service.step(self.now)
        if running is None:
            return
        number, now = running.number, self.now
        self.log.first_s[number] = running.first_s
        self.log.end_s[number] = now
        self.log.fate[number] = Fate.COMPLETED
        self._note_pause(running)
        early = running.booked.end_s > now
        self._admission.leave(running, now)
        del self._present[number]
        self._admission.wake(running.chain.servers, now, early=early)

    def _refuse(self, running: Running) -> None:
        self.log.fate[running.number] = Fate.FAILED if running.replays else Fate.REFUSED
        running.version += 1
        del self._present[running.number]

    def _down(self, server: int) -> None:
        affected = self._admission.on(each.number for each in self._state.fail(server, self.now))
        freed = {other for running in affected for other in running.chain.servers}
        for running in affected:
            if running.started:
                self._lose_chain(running)
            self._admission.leave(running, self.now)
            running.attempted_s = self.now
        for running in affected:
            self._admission.attempt(running, self.now)
        self._admission.wake(sorted(freed - {server}), self.now, early=True)

    def _lose_chain(self, running: Running) -> None:
        """It needs another chain, through which its tokens so far go as a prompt; that gives the next one."""
        self._note_pause(running)
        tokens, last_s = self._service.abandon(running, self.now)
        tokens = min(tokens, running.output - 1)
        self.log.failovers[running.number] += 1
        if tokens:
            running.last_s = last_s
        running.replays = True
        if self._course.world.tokens is not None:
            prompt = running.prompt or self._course.world.tokens.prompt
            running.prompt = prompt + tokens
        self.log.replayed_tokens[running.number] += running.prompt or tokens
        running.output -= tokens

    def _note_pause(self, running: Running) -> None:
        """The pause before the first token after a loss."""
        if running.last_s is None or running.attempt_first_s is None or running.attempt_first_s > self.now:
            return
        if running.number >= self._course.warm_up:
            self._pauses_s.append(running.attempt_first_s - running.last_s)
        running.last_s = None

    def _up(self, server: int) -> None:
        assert self._course.join is not None, "who lets servers come says what they take"
        span, slots = self._course.join(server)
        self._state.resize(server, self.now, slots=slots, span=span)
        self._memory.slots[server] = slots

    def _stop(self) -> None:
        for running in self._present.values():
            if running.started:
                self._memory.release(running.chain, running.slots, since_s=running.held_since_s, now=self.now)
                self._service.abandon(running, self.now)


def _empty_log(course: Course) -> Log:
    sessions, tokens, count = course.sessions, course.world.tokens, len(course.sessions)
    prompts, outputs = sessions.prompt_tokens, sessions.output_tokens
    return Log.empty(
        sessions.client,
        sessions.arrival_s,
        np.full(count, tokens.prompt if tokens else 0) if prompts is None else prompts,
        np.full(count, course.problem.output_tokens) if outputs is None else outputs,
    )


def _slots_per_block(course: Course, log: Log) -> Ints | None:
    """(N,); None if all sessions have the workload's length."""
    if course.sessions.prompt_tokens is None:
        return None
    pages = (log.prompt_tokens + log.output_tokens) / course.world.page_tokens()
    return np.ceil(pages).astype(np.int64)
