"""The addresses of hosts.

libp2p neither tells peers addresses that are private, nor punches holes to them: so all hosts have addresses that look
public. They are of a network that nobody announces on the Internet, and no packet leaves this machine.
"""

import socket
from collections.abc import Iterable
from dataclasses import dataclass

from geopetals.wan.spec import HostSpec

NETWORK = ("11.77.0.0", 16)
LAN_PREFIX = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """`public`: where others see the host. `own`: what its device has, another one behind NAT."""

    public: str
    own: str

    @property
    def public_bytes(self) -> bytes:
        return socket.inet_aton(self.public)

    @property
    def own_bytes(self) -> bytes:
        return socket.inet_aton(self.own)


def addresses(hosts: Iterable[HostSpec]) -> dict[str, Addresses]:
    """By name, in order."""
    return {host.name: _of(number, host) for number, host in enumerate(hosts, 1)}


def _of(number: int, host: HostSpec) -> Addresses:
    public = f"11.77.0.{number}"
    return Addresses(public=public, own=public if host.nat is None else f"192.168.{number}.2")
