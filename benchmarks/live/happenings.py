"""Servers that die and join while a run goes on, by a scenario's timetable."""

import threading
import time

from live.scenario import LiveScenario
from live.stage import Swarm


class Timetable:
    """From `start` on; times are the scenario's, slowed down by its dilation."""

    def __init__(self, swarm: Swarm, scenario: LiveScenario) -> None:
        self._swarm, self._dilation = swarm, scenario.dilation
        self._events = sorted(scenario.events, key=lambda event: event.at_s)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.done: list[dict[str, float | str]] = []
        """What happened, and when after the start."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        for event in self._events:
            if self._stopped.wait(max(began + event.at_s * self._dilation - time.monotonic(), 0.0)):
                return
            at_s = (time.monotonic() - began) / self._dilation
            if event.down is not None:
                self._swarm.kill(event.server)
                self.done.append({"at_s": at_s, "down": event.server})
            else:
                self._swarm.join(event.server)
                self.done.append({"at_s": at_s, "up": event.server})


def absent_at_first(scenario: LiveScenario) -> set[str]:
    """Servers of which the first that is told is that they come."""
    first: dict[str, bool] = {}
    for event in sorted(scenario.events, key=lambda event: event.at_s):
        first.setdefault(event.server, event.up is not None)
    return {server for server, comes in first.items() if comes}
