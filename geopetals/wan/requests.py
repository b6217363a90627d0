"""What a running network is asked: its state, changes, and the way into its hosts."""

import gc
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

from geopetals.errors import GeoPetalsError
from geopetals.wan import control, namespaces
from geopetals.wan.changes import Change, Target, parse_target
from geopetals.wan.errors import WanError
from geopetals.wan.fabric import Fabric, Link
from geopetals.wan.namespaces import Namespace
from geopetals.wan.router import Router

MOST_LINKS = 1000
_Answer = tuple[Any, list[int]]


class Requests:
    """Answers one request per connection, within the router's loop: each takes well below a millisecond."""

    def __init__(
        self,
        *,
        fabric: Fabric,
        router: Router,
        hosts: Mapping[str, Namespace],
        user_namespace: list[int],
        describe: Callable[[], dict[str, Any]],
        end: Callable[[], None],
    ) -> None:
        self._fabric, self._router, self._hosts, self._user = fabric, router, hosts, user_namespace
        self._describe, self._end = describe, end
        self._ending = False
        self._actions: dict[str, Callable[[Mapping[str, Any]], _Answer]] = {
            "status": self._status,
            "links": self._links,
            "reset": self._reset,
            "change": self._change,
            "cut": self._cut,
            "heal": self._heal,
            "enter": self._enter,
            "down": self._down,
        }

    def serve(self, server: socket.socket) -> None:
        """Answer whoever connects."""

        def accept() -> None:
            try:
                connection, _ = server.accept()
            except OSError:
                return  # gone again
            connection.setblocking(False)
            self._router.watch(connection.fileno(), lambda: self._answer(connection))

        self._router.watch(server.fileno(), accept)

    def _answer(self, connection: socket.socket) -> None:
        self._router.unwatch(connection.fileno())
        with connection:
            try:
                data = connection.recv(control.LARGEST)
            except OSError:
                return
            if data:
                control.answer(connection, *self._reply(data))

    def _reply(self, data: bytes) -> tuple[dict[str, Any], list[int]]:
        try:
            message = json.loads(data)
            value, files = self._actions[message["do"]](message)
        except GeoPetalsError as error:
            return {"error": str(error)}, []
        except (KeyError, TypeError, ValueError) as error:
            return {"error": f"the router does not understand this request ({error!r}): is it of another release?"}, []
        return {"ok": value}, files

    def _status(self, message: Mapping[str, Any]) -> _Answer:
        ports, links = self._fabric.ports.values(), self._fabric.links
        return self._describe() | {
            "cut_hosts": [port.name for port in ports if port.cut],
            "cut_links": [list(pair) for pair, link in links.items() if link.cut],
            "run": self._router.counts(),
        }, []

    def _links(self, message: Mapping[str, Any]) -> _Answer:
        pairs = self._target(message["target"]).pairs
        if len(pairs) > MOST_LINKS:
            raise WanError(f"these are {len(pairs)} links: ask for those of one host, or of a pair.")
        return [_shown(self._fabric.links[pair]) for pair in pairs], []

    def _reset(self, message: Mapping[str, Any]) -> _Answer:
        found = self._router.counts()
        gc.collect()  # only asked for between runs
        self._router.reset_counts()
        return found, []

    def _change(self, message: Mapping[str, Any]) -> _Answer:
        target, change = self._target(message["target"]), Change.from_value(message["change"])
        if change.of_hosts and not target.hosts:
            raise WanError("access lines belong to hosts: name a host to set --up or --down, not a pair.")
        self._fabric.change(target, change)
        if change.loss is not None:
            self.set_segmentation()
        return None, []

    def set_segmentation(self) -> None:
        """Where packets get lost, the kernel hands over each as it would go over a wire."""
        for name, namespace in self._hosts.items():
            whole = not self._fabric.loses_packets(self._fabric.ports[name])
            namespaces.set_segmentation(namespace.tun, whole=whole)

    def _cut(self, message: Mapping[str, Any]) -> _Answer:
        self._fabric.set_cut(self._target(message["target"]), True)
        return None, []

    def _heal(self, message: Mapping[str, Any]) -> _Answer:
        if message.get("target") is None:
            self._fabric.heal()
        else:
            self._fabric.set_cut(self._target(message["target"]), False)
        return None, []

    def _enter(self, message: Mapping[str, Any]) -> _Answer:
        host = message["host"]
        if self._ending:
            raise WanError("the network is being taken down: start another.")
        if host not in self._hosts:
            shown = ", ".join(list(self._hosts)[:12])
            raise WanError(f"there is no host {host!r}: choose one of {shown}.")
        return None, [*self._user, self._hosts[host].file]

    def _down(self, message: Mapping[str, Any]) -> _Answer:
        self._ending = True
        self._end()
        return None, []

    def _target(self, text: str) -> Target:
        return parse_target(text, tuple(self._hosts))


def _shown(link: Link) -> dict[str, Any]:
    spec = link.spec
    return {
        "from": link.source.name,
        "to": link.target.name,
        "rtt_s": spec.rtt_s if link.delay_s != float("inf") else None,
        "bandwidth_bit_per_s": spec.bandwidth_bit_per_s,
        "jitter_s": spec.jitter_s,
        "loss": spec.loss,
        "cut": link.cut,
        "packets": link.packets,
    }
