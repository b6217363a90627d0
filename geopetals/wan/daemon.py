"""The process that is a network: `python -m geopetals.wan.daemon STATE_DIRECTORY LOCK_FILE READY_FILE [OWNER_PID]`.

It holds the lock of the state directory, tells through READY_FILE in one line of JSON whether the network is up, and
ends every process in its namespaces before it ends itself. With an owner it ends when the owner does.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from geopetals.errors import GeoPetalsError
from geopetals.wan import control, namespaces, processes
from geopetals.wan.addresses import LAN_PREFIX, NETWORK, Addresses, addresses
from geopetals.wan.fabric import Fabric
from geopetals.wan.namespaces import Namespace
from geopetals.wan.requests import Requests
from geopetals.wan.router import Router
from geopetals.wan.state import StateDirectory, start_time

_PRIORITY = 20
_NICE = -20
_PR_SET_TIMERSLACK = 29


class Daemon:
    """One network, from its namespaces to its control socket. Raises WanError if this machine does not allow it."""

    def __init__(self, directory: StateDirectory) -> None:
        spec = directory.spec()
        namespaces.check_supported()
        self._realtime = take_priority()
        self._rootless = namespaces.isolate()
        user = [os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)] if self._rootless else []
        self._addresses = addresses(spec.hosts)
        self._hosts = {host.name: _create(self._addresses[host.name]) for host in spec.hosts}
        namespaces.isolate()  # this process is in no host's network
        self._fabric = Fabric(spec, self._addresses)
        self._router = Router(self._fabric, {name: host.tun for name, host in self._hosts.items()})
        self._requests = Requests(
            fabric=self._fabric,
            router=self._router,
            hosts=self._hosts,
            user_namespace=user,
            describe=self.describe,
            end=self.end,
        )
        self._requests.set_segmentation()
        self._ending: threading.Thread | None = None
        self._unkillable = False

    def describe(self) -> dict[str, Any]:
        """What others need to know about the network as it was started."""
        return {
            "pid": os.getpid(),
            "start_time": start_time(os.getpid()),
            "realtime": self._realtime,
            "rootless": self._rootless,
            "dilation": self._fabric.spec.dilation,
            "hosts": {name: self._describe_host(name, host) for name, host in self._hosts.items()},
        }

    def follow(self, owner: int) -> None:
        """End when this process does."""
        try:
            handle = os.pidfd_open(owner)
        except ProcessLookupError:
            self.end()
            return

        def ended() -> None:
            self._router.unwatch(handle)
            self.end()

        self._router.watch(handle, ended)

    def run(self, directory: StateDirectory, ready: Callable[[], None]) -> bool:
        """Until somebody ends it; tell whether nothing is left. `ready` is called when requests are answered."""
        with control.listen(directory.path) as server:
            directory.write_state(self.describe())
            self._requests.serve(server)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, lambda *_: self.end())
            signal.set_wakeup_fd(self._router.wake_file, warn_on_full_buffer=False)
            gc.collect()
            gc.freeze()
            ready()
            gc.disable()  # packets make no cycles, and a collection is a pause
            self._router.run()
        return not self._unkillable

    def end(self) -> None:
        """End what runs in the hosts, which may say goodbye through the network, then the loop."""
        if self._ending is None:
            self._ending = threading.Thread(target=self._end)
            self._ending.start()

    def _end(self) -> None:
        try:
            processes.end_all({host.identity for host in self._hosts.values()})
        except GeoPetalsError:
            self._unkillable = True
            traceback.print_exc()
        finally:
            self._router.stop()

    def _describe_host(self, name: str, host: Namespace) -> dict[str, Any]:
        port, address = self._fabric.ports[name], self._addresses[name]
        return {
            "address": address.own,
            "public_address": address.public,
            "nat": port.spec.nat,
            "up_bit_per_s": port.up.bit_per_s,
            "down_bit_per_s": port.down.bit_per_s,
            "namespace": list(host.identity),
            "cookie": host.cookie,
        }


def take_priority() -> bool:
    """Run before everything else on this machine if that is allowed; tell whether it is."""
    with suppress(OSError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))
    except OSError:
        return False
    return True


def _create(address: Addresses) -> Namespace:
    if address.own == address.public:
        return namespaces.create(address.own, NETWORK[1])
    return namespaces.create(address.own, LAN_PREFIX, routes=[NETWORK])


def main(arguments: list[str]) -> int:
    """Exit code 0 when nothing is left of the network."""
    directory, ready, owners = StateDirectory(Path(arguments[0])), int(arguments[2]), arguments[3:]
    os.umask(0o077)
    os.chdir("/")
    try:
        daemon = Daemon(directory)
    except GeoPetalsError as error:
        _tell(ready, {"error": str(error)})
        return 1
    for owner in owners:
        daemon.follow(int(owner))
    if not daemon.run(directory, lambda: _tell(ready, {"ok": daemon.describe()})):
        return 1
    directory.clean()
    directory.remove()
    return 0


def _tell(ready: int, answer: dict[str, Any]) -> None:
    with suppress(BrokenPipeError), os.fdopen(ready, "w") as stream:
        json.dump(answer, stream)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
