"""The loop that carries packets between TUN devices when the fabric says so."""

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from geopetals.wan.fabric import Fabric, Port
from geopetals.wan.lateness import Lateness

# Waking up takes a virtual machine 70 to 100 us: the last of a wait is spent looking at the clock.
SPIN_S = 80e-6
_BATCH = 16
_LARGEST = 65_535 + 64
_LONGEST_WAIT_S = 3600.0


class Router:
    """Reads what hosts send, hands it to the fabric, and writes what is due."""

    def __init__(self, fabric: Fabric, tuns: Mapping[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        self._fabric, self._clock = fabric, clock
        self._ports = {tun: fabric.ports[name] for name, tun in tuns.items()}
        self._tun_of = {fabric.ports[name]: tun for name, tun in tuns.items()}
        self._others: dict[int, Callable[[], None]] = {}
        self._files = list(self._ports)
        self._waker, self._woken = socket.socketpair()
        for end in (self._waker, self._woken):
            end.setblocking(False)
        self.watch(self._woken.fileno(), self._wake_up)
        self._stopped = False
        self.reset_counts()

    @property
    def wake_file(self) -> int:
        """Writing a byte here wakes the loop: for `signal.set_wakeup_fd`."""
        return self._waker.fileno()

    def watch(self, file: int, callback: Callable[[], None]) -> None:
        """Call back whenever the file can be read."""
        self._others[file] = callback
        self._files.append(file)

    def unwatch(self, file: int) -> None:
        """For good: the file may be closed."""
        del self._others[file]
        self._files.remove(file)

    def stop(self) -> None:
        """From any thread: end `run`."""
        self._stopped = True
        with contextlib.suppress(BlockingIOError):
            self._waker.send(b"\0")

    def reset_counts(self) -> None:
        self.lateness = Lateness()
        self.bytes = self.unwritable = 0
        self._fabric.reset_counts()
        self._since_s, self._cpu_since_s = time.monotonic(), time.process_time()

    def counts(self) -> dict[str, Any]:
        """Since the last reset."""
        fabric, seconds = self._fabric, time.monotonic() - self._since_s
        return {
            "seconds": seconds,
            "router_cpu_share": (time.process_time() - self._cpu_since_s) / max(seconds, 1e-9),
            "lateness": self.lateness.to_value(),
            "bytes": self.bytes,
            "dropped": {
                "lost": fabric.lost,
                "queue_full": fabric.overflowed,
                "cut": fabric.cut,
                "nat": fabric.filtered,
                "no_such_address": fabric.unroutable,
                "interface_down": self.unwritable,
            },
            "in_flight": fabric.in_flight,
        }

    def run(self) -> None:
        while not self._stopped:
            ready = select.select(self._files, (), (), self._wait_s())[0]
            now = self._clock()
            for file in ready:
                port = self._ports.get(file)
                if port is None:
                    callback = self._others.get(file)
                    if callback is not None:
                        callback()
                else:
                    self._read(file, port, now)
                self._deliver()
            if not ready:
                self._deliver()

    def _wait_s(self) -> float:
        # poll() and epoll_wait() of Python 3.11 count milliseconds, select() microseconds.
        wait_s = self._fabric.next_event() - self._clock()
        return 0.0 if wait_s <= SPIN_S else min(wait_s - SPIN_S, _LONGEST_WAIT_S)

    def _read(self, tun: int, port: Port, now: float) -> None:
        """The first packet was there when select() returned at `now`; later ones may have come since."""
        for _ in range(_BATCH):
            try:
                packet = os.read(tun, _LARGEST)
            except BlockingIOError:
                return
            except OSError:
                self._give_up(tun)
                return
            self._fabric.admit(port, packet, now)
            now = self._clock()

    def _deliver(self) -> None:
        pop, clock, add = self._fabric.pop, self._clock, self.lateness.add
        while (delivery := pop(clock())) is not None:
            due, port, packet = delivery
            try:
                self.bytes += os.write(self._tun_of[port], packet)
            except OSError:
                self.unwritable += 1
                continue
            add(clock() - due)

    def _give_up(self, tun: int) -> None:
        """Whoever is root in a host may delete its device; select() would report that forever."""
        del self._ports[tun]
        self._files.remove(tun)

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
