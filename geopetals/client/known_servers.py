"""The servers that a client has heard of, also when the DHT has lost their records for a while."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from geopetals.coordinator.messages import ChainHop
from geopetals.swarm.records import EXPIRATION_S, ServerRecord
from geopetals.swarm.ring_messages import VERSION
from geopetals.swarm.stack import ServerState

_KEPT_S = 600.0


@dataclass(frozen=True, slots=True)
class _Known:
    """`record` is what counts, `in_dht` what the DHT said last, None for a server that it has not named."""

    record: ServerRecord
    in_dht: ServerRecord | None
    at: float


class KnownServers:
    """The newest record of each server. Whether they still answer others find out."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: dict[str, _Known] = {}

    @property
    def online(self) -> list[ServerRecord]:
        """Who serves, or did when that was last heard of."""
        return [known.record for known in self._found.values() if known.record.is_online]

    def update(self, records: Iterable[ServerRecord]) -> list[ServerRecord]:
        """What the DHT says now; returns those that are online."""
        now = self._clock()
        for record in records:
            known = self._found.get(record.peer_id)
            if known is None or now - known.at > EXPIRATION_S or not _is_overtaken(record, known):
                self._found[record.peer_id] = _Known(record, record, now)
        self._found = {peer_id: known for peer_id, known in self._found.items() if now - known.at <= _KEPT_S}
        return self.online

    def learn(self, chain: Iterable[ChainHop]) -> list[ServerRecord]:
        """What the coordinator's chain says: it hears of a move before the DHT does; returns those that are online."""
        for hop in chain:
            known = self._found.get(hop.peer_id)
            if known is None:
                known = _Known(_record_of(hop), None, 0.0)
            elif not (known.record.is_online and known.record.start <= hop.start and hop.end <= known.record.end):
                known = replace(known, record=_moved(known.record, hop))
            self._found[hop.peer_id] = replace(known, at=self._clock())
        return self.online


def _is_overtaken(record: ServerRecord, known: _Known) -> bool:
    """Whether a record may be from before the coordinator told of another span: the DHT keeps such for a while."""
    before = known.in_dht
    if before is None or before is known.record or _span(record) != _span(before):
        return False
    return record.state is before.state or not record.is_online


def _span(record: ServerRecord) -> tuple[int, int]:
    return record.start, record.end


def _record_of(hop: ChainHop) -> ServerRecord:
    return ServerRecord(
        peer_id=hop.peer_id, start=hop.start, end=hop.end, state=ServerState.ONLINE, throughput=0.0, protocol=VERSION
    )


def _moved(record: ServerRecord, hop: ChainHop) -> ServerRecord:
    return replace(record, start=hop.start, end=hop.end, state=ServerState.ONLINE, block_hashes={})
