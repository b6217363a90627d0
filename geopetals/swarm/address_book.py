"""Where peers can be reached, by what each has said of itself in the DHT: for when libp2p does not know.

libp2p's own ways drop addresses that are neither private nor public, and a peer that comes back is not dialled until
the backoff of its old addresses ends, up to five minutes. So each peer that listens keeps one record, under its own
peer id, and who cannot reach it looks there, and asks its relays whether they can.

What a record says is not believed. p2pd checks that who answers has the peer id. Nobody is to make others knock at
doors inside their networks: an address is dialled only if it is a public one, or one of this very machine's that is
not loopback (peers that share a machine in a reserved net need no more). Names are not: they may stand for anything.
"""

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from hivemind.dht import DHTNode
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import get_dht_time

from geopetals.swarm.circuits import CIRCUIT, relay_of
from geopetals.swarm.record_signing import SignedRecords
from geopetals.swarm.relay_protocol import UNREACHABLE, can_reach
from geopetals.swarm.relay_records import found_under
from geopetals.swarm.wire import short_peer

if TYPE_CHECKING:
    from geopetals.swarm.guarded_p2p import GuardedP2P

log = logging.getLogger(__name__)

_KEY = "_geopetals.addresses."
_PERIOD_S, _UPDATE_PERIOD_S, _EXPIRATION_S = 2.0, 30.0, 90.0
_MOST_ADDRESSES = 4
_READ_TIMEOUT_S, _DIAL_TIMEOUT_S, _ANSWER_TIMEOUT_S = 3.0, 5.0, 3.0
_AGAIN_S = 2.0
_MOST_AT_ONCE = 8
_MOST_REMEMBERED = 1024
_NOT_FOUND = ("routing: not found", "failed to find any peer", "no addresses")
_PEER = "[1-9A-HJ-NP-Za-km-z]{40,64}"
_ADDRESS = re.compile(
    rf"/ip([46])/([0-9A-Fa-f.:]{{2,45}})/tcp/([1-9][0-9]{{0,4}})(?:/p2p/{_PEER}/p2p-circuit)?/p2p/({_PEER})"
)
_is_asking = ContextVar("_is_asking", default=False)


async def keep_announced(node: DHTNode, addresses: Callable[[], Awaitable[tuple[str, ...]]]) -> None:
    """Keep the record of this peer current, until cancelled."""
    peer_id = node.protocol.p2p.peer_id.to_base58()
    told, told_at = tuple[str, ...](), 0.0
    while True:
        try:
            now = tuple(filter(_is_for_others, await addresses()))[:_MOST_ADDRESSES]
            is_due = now != told or time.monotonic() - told_at > _UPDATE_PERIOD_S
            if now and is_due and _may_write(node) and await _announce(node, peer_id, now):
                told, told_at = now, time.monotonic()
        except Exception as error:  # noqa: BLE001 - the next round may succeed; a dead p2pd is noticed elsewhere
            log.debug("addresses.not_told reason=%r", error)
        await asyncio.sleep(_PERIOD_S)


async def _announce(node: DHTNode, peer_id: str, addresses: tuple[str, ...]) -> bool:
    expiration = get_dht_time() + _EXPIRATION_S
    stored = await node.store(_KEY + peer_id, list(addresses), expiration, subkey=peer_id)
    return bool(stored)


def _may_write(node: DHTNode) -> bool:
    validator = node.protocol.record_validator
    return not isinstance(validator, SignedRecords) or bool(validator.certificate)


def _is_for_others(address: str) -> bool:
    found = _ADDRESS.fullmatch(address)
    return found is not None and not ipaddress.ip_address(found[2]).is_loopback


def dialable(value: Any, peer_id: str) -> tuple[str, ...]:
    """Of what a record of this peer says, the addresses that may be dialled; at most four."""
    if not isinstance(value, list):
        return ()
    return tuple(address for address in value[:_MOST_ADDRESSES] if _is_dialable(address, peer_id))


def _is_dialable(address: Any, peer_id: str) -> bool:
    found = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if found is None or found[4] != peer_id or int(found[3]) > 65535:
        return False
    try:
        host = ipaddress.ip_address(found[2])
    except ValueError:
        return False
    if str(host.version) != found[1] or host.is_multicast or host.is_loopback or host.is_unspecified:
        return False
    if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped is not None:
        return False
    return host.is_global or _is_on_this_machine(host)


def _is_on_this_machine(host: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    family = socket.AF_INET if host.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((str(host), 0))
    except OSError:
        return False
    return True


class AddressBook:
    """Of one p2pd with a DHT node. Lives on the event loop."""

    def __init__(self, p2p: "GuardedP2P", node: DHTNode, introducers: Iterable[str]) -> None:
        """`introducers`: addresses of peers that this one was told of by its user, which p2pd forgets in time."""
        self._p2p, self._node = p2p, node
        self._introducers: dict[str, tuple[str, ...]] = {}
        for address in introducers:
            peer = address.rpartition("/p2p/")[2]
            self._introducers[peer] = (*self._introducers.get(peer, ()), address)
        self._tried: dict[str, tuple[float, asyncio.Task[bool]]] = {}

    async def reconnect(self, peer_id: PeerID, error: Exception) -> bool:
        """Whether there is a connection after all to a peer that p2pd has failed to find, or to dial over a relay."""
        reason, peer = str(error), peer_id.to_base58()
        is_unknown = any(words in reason for words in _NOT_FOUND)
        if _is_asking.get() or not (is_unknown or (CIRCUIT in reason and "dial" in reason)):
            return False
        now = time.monotonic()
        tried_at, trying = self._tried.get(peer, (float("-inf"), None))
        if trying is None or (trying.done() and now - tried_at >= _AGAIN_S):
            if not self._has_room(now):
                return False
            trying = asyncio.create_task(self._reconnect(peer))
            self._tried[peer] = now, trying
        await asyncio.wait([trying])
        return not trying.cancelled() and trying.result()

    def close(self) -> None:
        for _, trying in self._tried.values():
            trying.cancel()

    def _has_room(self, now: float) -> bool:
        if len(self._tried) >= _MOST_REMEMBERED:
            self._tried = {peer: tried for peer, tried in self._tried.items() if now - tried[0] < _AGAIN_S}
        return sum(not trying.done() for _, trying in self._tried.values()) < _MOST_AT_ONCE

    async def _reconnect(self, peer: str) -> bool:
        _is_asking.set(True)  # to ask may mean to call others who cannot be reached; they are not looked up in turn
        try:
            addresses = self._introducers.get(peer, ())
            is_connected = await self._dial(peer, addresses)
            if not is_connected:
                record = (await found_under(self._node, _KEY + peer, timeout_s=_READ_TIMEOUT_S)).get(peer)
                addresses = dialable(record, peer)
                is_connected = await self._dial(peer, addresses)
        except Exception as error:  # noqa: BLE001 - whatever the reason, there is no connection
            log.debug("book.failed peer=%s reason=%r", short_peer(peer), error)
            return False
        log.info("book.dialled peer=%s addresses=%d connected=%s", short_peer(peer), len(addresses), is_connected)
        return is_connected

    async def _dial(self, peer: str, addresses: tuple[str, ...]) -> bool:
        direct = [address.removesuffix(f"/p2p/{peer}") for address in addresses if not relay_of(address)]
        if direct and await self._connect(peer, direct):
            return True
        for address in addresses:
            if relay_of(address) and await self._dial_over(address, peer):
                return True
        return False

    async def _dial_over(self, address: str, peer: str) -> bool:
        """A relay knows at once whether the peer is there. The circuit's short name is another address to libp2p, so
        that the backoff of the long one, from when the peer was away, does not count.
        """
        relay = relay_of(address)
        where = address.partition(f"/p2p/{relay}")[0]
        if not await self._connect(relay, [where]):
            return False
        if not await can_reach(self._p2p, relay, peer, timeout_s=_ANSWER_TIMEOUT_S):
            return False
        return await self._connect(peer, [f"/p2p/{relay}{CIRCUIT}"])

    async def _connect(self, peer: str, addresses: list[str]) -> bool:
        with contextlib.suppress(*UNREACHABLE, TimeoutError):
            async with asyncio.timeout(_DIAL_TIMEOUT_S):
                await self._p2p.dial(PeerID.from_base58(peer), addresses)
                return True
        return False
