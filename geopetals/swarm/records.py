"""What servers say of themselves in the DHT: PETALS' records with GeoPETALS' additions, read with suspicion.

Every block has a key `<swarm>.<block>`; under it each server stores PETALS' ServerInfo as a tuple. Our additions stand
in one nested map that stock peers ignore: version, model identity, and the sha256 of that very block's weights.
"""

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hivemind.dht import DHTNode
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import get_dht_time

import geopetals
from geopetals.errors import SwarmMismatch
from geopetals.swarm.emulation import read_status
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.record_signing import SignedRecords
from geopetals.swarm.ring_messages import VERSION
from geopetals.swarm.stack import UID_DELIMITER, ModelInfo, ServerInfo, ServerState
from geopetals.swarm.wire import short_peer

log = logging.getLogger(__name__)

UPDATE_PERIOD_S = 30.0
EXPIRATION_S = 90.0
_READ_TIMEOUT_S, _RETRY_TIMEOUT_S = 3.0, 1.0
_MODELS_KEY = "_petals.models"
_ADDITIONS = "geopetals"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """One server as the swarm sees it: blocks [start, end) and how fast it says it is.

    `inference_rps` is decode tokens per second through one block, `throughput` prompt tokens per second through all of
    its blocks (PETALS' conventions), `cache_tokens_left` how many more tokens fit into the cache of each block.
    `block_hashes` maps blocks to the sha256 of their weights. `protocol` is the version of our extension of PETALS'
    sessions that it speaks, 0 for stock servers. `emulated` is what the server says of the device it emulates, in
    benchmarks; None is a real one. `using_relay`: it stands behind NAT and is reached through relays.
    `links`: round trips in seconds that it measured to other servers, by peer id.
    """

    peer_id: str
    start: int
    end: int
    state: ServerState
    throughput: float
    name: str | None = None
    version: str | None = None
    inference_rps: float | None = None
    cache_tokens_left: int | None = None
    identity: ModelIdentity | None = None
    block_hashes: Mapping[int, str] = field(default_factory=dict)
    protocol: int = 0
    emulated: Mapping[str, Any] | None = None
    using_relay: bool = False
    links: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_online(self) -> bool:
        return self.state is ServerState.ONLINE


def block_uids(swarm: str, start: int, end: int) -> list[str]:
    return [f"{swarm}{UID_DELIMITER}{block}" for block in range(start, end)]


async def announce(
    node: DHTNode,
    swarm: str,
    info: ServerInfo,
    *,
    identity: ModelIdentity,
    block_hashes: Mapping[int, str],
    num_blocks: int,
    emulated: Mapping[str, Any] | None = None,
) -> None:
    """Store one record per block of [info.start_block, info.end_block).

    In open swarms the model is put on PETALS' list of models, too.
    """
    state, throughput, extra = info.to_tuple()
    values = []
    for block in range(info.start_block, info.end_block):
        additions: dict[str, Any] = {
            "version": geopetals.__version__,
            "protocol": VERSION,
            "identity": identity.to_dict(),
        }
        if block in block_hashes:
            additions["weights_sha256"] = block_hashes[block]
        if emulated is not None:
            additions["emulated"] = emulated
        values.append((state, throughput, {**extra, _ADDITIONS: additions}))
    peer_id = node.protocol.p2p.peer_id.to_base58()
    expiration = get_dht_time() + EXPIRATION_S
    keys = block_uids(swarm, info.start_block, info.end_block)
    await node.store_many(keys, values, expiration, subkeys=[peer_id] * len(keys))
    if _signing(node) is not None:
        return
    model = ModelInfo(num_blocks=num_blocks).to_dict()
    await node.store(_MODELS_KEY, subkey=swarm, value=model, expiration_time=expiration)


async def read_servers(node: DHTNode, swarm: str, num_blocks: int) -> list[ServerRecord]:
    """All servers of the swarm that the DHT knows now, by peer id.

    Malformed records are passed over; in closed swarms also those of strangers, and of who does not say which model and
    weights it serves.
    """
    signing = _signing(node)
    uids = block_uids(swarm, 0, num_blocks)
    found = await _get_all(node, uids)
    servers: dict[str, list[_Entry]] = {}
    for block, uid in enumerate(uids):
        entry = found.get(uid)
        if entry is None or not isinstance(entry.value, dict):
            continue
        for peer_id, value in entry.value.items():
            parsed = _parse(value.value)
            if parsed is None or not _is_peer_id(peer_id):
                continue
            if signing is None or (signing.is_member(peer_id) and _says_what_it_serves(*parsed)):
                servers.setdefault(peer_id, []).append(_Entry(block, *parsed, value.expiration_time))
    records = (_merge(peer_id, entries, num_blocks) for peer_id, entries in sorted(servers.items()))
    return [record for record in records if record is not None]


def _signing(node: DHTNode) -> SignedRecords | None:
    """Of a closed swarm."""
    validator = node.protocol.record_validator
    return validator if isinstance(validator, SignedRecords) else None


def _says_what_it_serves(info: ServerInfo, additions: dict[str, Any]) -> bool:
    """Weights have a hash once they are loaded."""
    has_weights = info.state is not ServerState.ONLINE or isinstance(additions.get("weights_sha256"), str)
    return has_weights and _identity(additions) is not None


async def _get_all(node: DHTNode, keys: list[str]) -> dict[str, Any]:
    """What the DHT holds under the keys. One malformed record can keep hivemind's search for it, and for others in the
    same call, from ever ending: such keys are asked for again one by one, and then given up.
    """
    search = await node.get_many(keys, sufficient_expiration_time=math.inf, return_futures=True)
    found = await _settled(search, _READ_TIMEOUT_S)
    missing = [key for key in keys if key not in found]
    if missing:
        log.warning("records.unreadable keys=%d", len(missing))
        again: dict[str, asyncio.Future[Any]] = {}
        for key in missing:
            again |= await node.get_many([key], sufficient_expiration_time=math.inf, return_futures=True)
        found |= await _settled(again, _RETRY_TIMEOUT_S)
    return found


async def _settled(search: dict[str, asyncio.Future[Any]], timeout_s: float) -> dict[str, Any]:
    """The results that are there in time; the other searches are cancelled."""
    await asyncio.wait(search.values(), timeout=timeout_s)
    results = {}
    for key, future in search.items():
        if future.done() and not future.cancelled() and future.exception() is None:
            results[key] = future.result()
        else:
            future.cancel()
    return results


def _is_peer_id(text: Any) -> bool:
    """libp2p's ids are the base58 of a multihash: of a sha256, or of an Ed25519 key itself."""
    try:
        return isinstance(text, str) and len(PeerID.from_base58(text).to_bytes()) in (34, 38)
    except ValueError:
        return False


def _parse(value: Any) -> tuple[ServerInfo, dict[str, Any]] | None:
    try:
        info = ServerInfo.from_tuple(value)
    except (TypeError, ValueError, KeyError, IndexError):
        return None
    additions = value[2].get(_ADDITIONS) if len(value) > 2 else None
    return info, additions if isinstance(additions, dict) else {}


class _Entry(NamedTuple):
    """A server's record under one block; it was written the later the later it expires."""

    block: int
    info: ServerInfo
    additions: dict[str, Any]
    expires_at: float


def _merge(peer_id: str, entries: list[_Entry], num_blocks: int) -> ServerRecord | None:
    """One server from its records under several blocks; what it says of its span is cut to the model.

    A server that has moved has left records under its former blocks: those that agree with the newest one count.
    """
    newest = max(entries, key=lambda entry: entry.expires_at)
    info, additions = newest.info, newest.additions
    entries = [entry for entry in entries if _span(entry.info) == _span(info)]
    start = info.start_block if info.start_block is not None else entries[0].block
    end = info.end_block if info.end_block is not None else entries[-1].block + 1
    start, end = max(start, 0), min(end, num_blocks)
    if start >= end:
        return None
    hashes = {
        entry.block: entry.additions["weights_sha256"]
        for entry in entries
        if isinstance(entry.additions.get("weights_sha256"), str)
    }
    return ServerRecord(
        peer_id=peer_id,
        start=start,
        end=end,
        state=info.state,
        throughput=info.throughput,
        name=info.public_name,
        version=info.version,
        inference_rps=info.inference_rps,
        cache_tokens_left=None if info.cache_tokens_left is None else info.cache_tokens_left // (2 * (end - start)),
        identity=_identity(additions),
        block_hashes=hashes,
        protocol=_protocol(additions),
        emulated=read_status(additions.get("emulated")),
        using_relay=info.using_relay is True,
        links=_links(info.next_pings),
    )


def _links(pings: Mapping[str, float] | None) -> dict[str, float]:
    """PETALS' servers tell of those that could follow them; infinite is no answer."""
    return {peer_id: float(rtt_s) for peer_id, rtt_s in (pings or {}).items() if 0 <= rtt_s < math.inf}


def _span(info: ServerInfo) -> tuple[int | None, int | None]:
    return info.start_block, info.end_block


def _identity(additions: dict[str, Any]) -> ModelIdentity | None:
    try:
        return ModelIdentity.from_dict(additions["identity"])
    except (KeyError, SwarmMismatch):
        return None


def _protocol(additions: dict[str, Any]) -> int:
    protocol = additions.get("protocol")
    return protocol if type(protocol) is int and protocol > 0 else 0


def check_same_model(identity: ModelIdentity, servers: list[ServerRecord]) -> list[ServerRecord]:
    """The servers that serve the model of `identity`, as far as both know.

    Raises SwarmMismatch if there are servers and none of them does; single strangers are passed over.
    """
    conflicts = {server.peer_id: identity.conflict(server.identity) if server.identity else None for server in servers}
    fitting = [server for server in servers if conflicts[server.peer_id] is None]
    for peer_id, conflict in conflicts.items():
        if conflict is not None:
            log.warning("server.mismatch server=%s reason=%s", short_peer(peer_id), conflict)
    if servers and not fitting:
        peer_id, conflict = next(iter(conflicts.items()))
        raise SwarmMismatch(f"server {short_peer(peer_id)} of this swarm serves another model: {conflict}")
    return fitting


def require_same_weights(servers: list[ServerRecord], block_hashes: Mapping[int, str]) -> None:
    """For a server that joins: raises SwarmMismatch if another holds other weights of one of its blocks."""
    for server in servers:
        for block, ours in block_hashes.items():
            if server.block_hashes.get(block, ours) != ours:
                raise SwarmMismatch(
                    f"block {block} has other weights here than on server {short_peer(server.peer_id)}: "
                    "load the same revision of the model as the swarm."
                )
