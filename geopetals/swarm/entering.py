"""How a server takes its place in the network: openly, or through relays if it stands behind NAT."""

import asyncio
import ipaddress
import logging
import random
import socket
import time
from dataclasses import dataclass, replace
from enum import StrEnum

from geopetals.errors import NetworkError
from geopetals.join_token import JoinToken
from geopetals.swarm import relay_records
from geopetals.swarm.circuits import relay_of
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.p2pd_options import is_loopback
from geopetals.swarm.reachability import Lost
from geopetals.swarm.relay_check import granting

log = logging.getLogger(__name__)

_RELAY_TIMEOUT_S = 10.0
_POLL_S = 0.1
_RESTART_DELAY_S = 1.0
_LONGEST_DELAY_S = 8.0
_RESTARTS_WITH_PEERS = 4
_ADDRESS = ("ip4", "ip6", "dns", "dns4", "dns6")


class Nat(StrEnum):
    """Whether a server stands behind NAT. AUTO finds it out: from its addresses, later from what AutoNAT says."""

    AUTO = "auto"
    YES = "yes"
    NO = "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrance:
    """`relays`: addresses of relays to use; if none of them takes this server, those that the swarm's DHT names.

    Behind NAT one relay at least has to; p2pd is given those that do.
    """

    config: NetworkConfig
    nat: Nat = Nat.AUTO
    relays: tuple[str, ...] = ()

    async def enter(self) -> Network:
        """Raises NetworkError as `Network.start` does, and where a server behind NAT finds no relay."""
        if not await self._is_behind_nat():
            return await Network.start(self._plain())
        known = self.relays
        relays = await granting(known)
        if not relays:
            known = tuple(dict.fromkeys((*known, *await self._named_relays())))
            relays = await granting(known)
        if not relays:
            raise _no_relay(known)
        config = replace(
            self.config,
            initial_peers=tuple(dict.fromkeys((*self.config.initial_peers, *relays))),  # they are nodes of the DHT, too
            relays=relays,
            spare_relays=tuple(relay for relay in known if relay not in relays),
            public_ip=None,
        )
        network = await Network.start(config)
        try:
            await _wait_relayed(network)
        except BaseException:
            await network.stop()
            raise
        return network

    async def enter_again(self, last: Network, why: Lost) -> Network:
        """In the place of a network that was stopped, with its port; its initial peers may be gone by now.

        Behind NAT it is tried until somebody can be reached; others go on without initial peers.
        """
        was = last.config
        relays = (*self.relays, *was.relays, *was.spare_relays)
        peers = dict.fromkeys((*self.config.initial_peers, *relays))
        config = replace(self.config, port=was.port, initial_peers=tuple(peers))
        nat = Nat.YES if was.relays or why is Lost.NAT else self.nat
        again = replace(self, config=config, nat=nat, relays=relays)
        attempt = 0
        while True:
            try:
                return await again.enter()
            except NetworkError as error:
                log.warning("p2pd.restart_failed attempt=%d reason=%s", attempt, error)
                if attempt >= _RESTARTS_WITH_PEERS and nat is not Nat.YES:
                    return await Network.start(replace(was, initial_peers=()))
                await asyncio.sleep(min(_RESTART_DELAY_S * 2**attempt, _LONGEST_DELAY_S))
                attempt += 1

    def _plain(self) -> NetworkConfig:
        watched = self.nat is Nat.AUTO and not is_loopback(self.config.host) and self.config.public_ip is None
        return replace(self.config, metrics_port=0 if watched else None, spare_relays=self.relays)

    async def _is_behind_nat(self) -> bool:
        if self.nat is not Nat.AUTO:
            return self.nat is Nat.YES
        if is_loopback(self.config.host) or self.config.public_ip is not None:
            return False
        return await asyncio.to_thread(_has_private_address, self.config.initial_peers)

    async def _named_relays(self) -> tuple[str, ...]:
        """Those that the swarm's DHT names."""
        network = await Network.start(replace(self.config, client_only=True))
        try:
            return await relay_records.read(network.node, random.Random())
        finally:
            await network.stop()


def default_host(token: JoinToken | None) -> str:
    """Where a server listens that is not told: on loopback, unless its swarm is elsewhere and asks for tickets."""
    if token is None or token.coordinator is None:
        return "127.0.0.1"
    hosts = {address.split("/")[2] for address in token.coordinator.addresses if not relay_of(address)}
    return "127.0.0.1" if all(map(is_loopback, hosts)) else "0.0.0.0"


def _no_relay(known: tuple[str, ...]) -> NetworkError:
    if known:
        return NetworkError(
            f"this server is behind NAT and none of {len(known)} relays answers: are they running, and reachable from "
            "this machine?"
        )
    return NetworkError(
        "this server is behind NAT and the swarm names no relay: run `geopetals relay --join TOKEN` on a machine with "
        "a public address, name one with --relays, or say --nat no if this server's port is open."
    )


async def _wait_relayed(network: Network) -> None:
    deadline = time.monotonic() + _RELAY_TIMEOUT_S
    while not await network.addresses():
        if time.monotonic() > deadline:
            raise NetworkError(
                f"none of {len(network.config.relays)} relays has taken this server within {_RELAY_TIMEOUT_S:.0f} s: "
                "are they running, and reachable from this machine?"
            )
        await asyncio.sleep(_POLL_S)


def _has_private_address(peers: tuple[str, ...]) -> bool:
    """Whether packets to a peer with a public address leave this machine from one that is none."""
    for peer in peers:
        _, kind, host, *_ = [*peer.split("/"), "", ""]
        if kind not in _ADDRESS:
            continue
        try:
            ((family, _, _, _, address), *_) = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # sends nothing
                own = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
        except (OSError, ValueError):
            continue
        if ipaddress.ip_address(address[0]).is_global:
            return not own.is_global
    return False
