"""How sessions that have their caches come to their tokens: each alone, or slowed down by the others."""

import heapq
from typing import Protocol

import numpy as np

from geopetals.problem import Floats, Problem
from geopetals.simulation.fluid import Fluid
from geopetals.simulation.running import Running
from geopetals.simulation.world import SessionTimes


class Service(Protocol):
    """Between `begin` and the end, or `abandon`, a session is in service."""

    exact: bool
    """The end that is predicted at admission comes true."""

    def begin(self, running: Running, now: float, constant_s: float) -> None: ...

    def next_s(self) -> float:
        """When something is done next; inf: never."""
        ...

    def step(self, now: float) -> Running | None:
        """Do what is next; gives the session, if that is over."""
        ...

    def abandon(self, running: Running, now: float) -> tuple[int, float]:
        """The session is out of service: tokens since it began, and when the last of them came, if any did."""
        ...

    def end_s(self, running: Running, now: float) -> float:
        """When the session will be over, as things are."""
        ...

    def measure(self, start_s: float, end_s: float, from_number: int) -> None:
        """Figures are about this time, and about sessions from this number on. Called before anything begins."""
        ...

    def intervals(self) -> tuple[Floats, Floats]:
        """Durations between tokens, and how many there were of each; pauses after a loss are not among them."""
        ...

    def compute_use(self) -> Floats:
        """(J,): share of the time measured that servers were at work."""
        ...


class Alone:
    """Sessions do not slow each other down: everything is known when one begins."""

    exact = True

    def __init__(self, problem: Problem, times: SessionTimes) -> None:
        self._times = times
        self._ends: list[tuple[float, int, Running, int]] = []
        self._window, self._from_number = (0.0, float("inf")), 0
        self._step_s: list[float] = []
        self._steps: list[int] = []
        self._work_s = np.zeros(problem.num_servers)

    def begin(self, running: Running, now: float, constant_s: float) -> None:
        first_s = self._times.first_s(running.client, running.chain, running.prompt)
        running.attempt_first_s = now + constant_s + first_s
        heapq.heappush(self._ends, (running.booked.end_s, running.number, running, running.version))

    def next_s(self) -> float:
        while self._ends and self._ends[0][3] != self._ends[0][2].version:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else float("inf")

    def step(self, now: float) -> Running | None:
        running = heapq.heappop(self._ends)[2]
        self._note(running, now, running.output)
        if running.first_s is None:
            running.first_s = running.attempt_first_s
        return running

    def abandon(self, running: Running, now: float) -> tuple[int, float]:
        first_s = running.attempt_first_s or now
        if now < first_s:
            self._note(running, now, 0)
            return 0, now
        step_s = self._step_of(running)
        tokens = min(1 + int((now - first_s) / step_s if step_s else running.output), running.output)
        self._note(running, now, tokens)
        if running.first_s is None:
            running.first_s = first_s
        return tokens, first_s + (tokens - 1) * step_s

    def end_s(self, running: Running, now: float) -> float:
        del now
        return running.booked.end_s

    def measure(self, start_s: float, end_s: float, from_number: int) -> None:
        self._window, self._from_number = (start_s, end_s), from_number

    def intervals(self) -> tuple[Floats, Floats]:
        return np.array(self._step_s), np.array(self._steps, dtype=np.float64)

    def compute_use(self) -> Floats:
        low, high = self._window
        return np.asarray(self._work_s / max(high - low, 1e-12))

    def _step_of(self, running: Running) -> float:
        return (running.booked.end_s - (running.attempt_first_s or 0.0)) / max(running.output - 1, 1)

    def _note(self, running: Running, now: float, tokens: int) -> None:
        if running.number >= self._from_number and tokens > 1:
            self._step_s.append(self._step_of(running))
            self._steps.append(tokens - 1)
        low, high = self._window
        since_s, chain = running.held_since_s, running.chain
        share = max(min(now, high) - max(since_s, low), 0.0) / max(now - since_s, 1e-12)
        if not share:
            return
        steps = share * max(tokens - 1, 0)
        prefill_s, decode_s = self._times.prefill_work_s(chain, running.prompt), self._times.decode_work_s(chain)
        for hop, prompt_s, step_s in zip(chain, prefill_s, decode_s, strict=True):
            self._work_s[hop.server] += share * prompt_s + steps * step_s


class Contended:
    """Sessions share the servers' compute, see Fluid."""

    exact = False

    def __init__(self, problem: Problem, times: SessionTimes, *, batched: bool) -> None:
        self._times, self._batched = times, batched
        self._fluid = Fluid(problem, batched=batched)
        self._running: dict[int, Running] = {}
        self._from_number = 0

    def begin(self, running: Running, now: float, constant_s: float) -> None:
        self._running[running.number] = running
        running.attempt_first_s = None
        chain = running.chain
        self._fluid.add(
            running.number,
            now,
            servers=chain.servers,
            work=self._times.prefill_work_s(chain, running.prompt),
            links_s=constant_s + self._times.first_links_s(running.client, chain, running.prompt),
            units=1,
            decode=False,
            measured=False,
        )

    def next_s(self) -> float:
        return self._fluid.first_done_s()

    def step(self, now: float) -> Running | None:
        running = self._running[self._fluid.first_done()]
        self._fluid.remove(running.number, now)
        if running.attempt_first_s is None:
            running.attempt_first_s = now
            if running.first_s is None:
                running.first_s = now
            if running.output > 1:
                self._decode(running, now)
                return None
        del self._running[running.number]
        return running

    def abandon(self, running: Running, now: float) -> tuple[int, float]:
        del self._running[running.number]
        unit_s = self._fluid.unit_s(running.number)
        left = self._fluid.remove(running.number, now)
        if running.attempt_first_s is None:
            return 0, now
        done = running.output - 1 - left
        return 1 + int(done), now - (done - int(done)) * unit_s

    def end_s(self, running: Running, now: float) -> float:
        """Decode steps are taken to last as long as now, or, before the first, as without others."""
        done_s = max(self._fluid.done_s(running.number), now)
        if running.attempt_first_s is not None:
            return done_s
        return done_s + (running.output - 1) * self._times.step_s(running.client, running.chain)

    def measure(self, start_s: float, end_s: float, from_number: int) -> None:
        self._fluid.measure(start_s, end_s)
        self._from_number = from_number

    def intervals(self) -> tuple[Floats, Floats]:
        return self._fluid.intervals.values_s(), self._fluid.intervals.counts

    def compute_use(self) -> Floats:
        return self._fluid.use()

    def _decode(self, running: Running, now: float) -> None:
        chain = running.chain
        work = [float(hop.blocks) for hop in chain] if self._batched else self._times.decode_work_s(chain)
        self._fluid.add(
            running.number,
            now,
            servers=chain.servers,
            work=work,
            links_s=self._times.step_links_s(running.client, chain),
            units=running.output - 1,
            decode=True,
            measured=running.number >= self._from_number,
        )
