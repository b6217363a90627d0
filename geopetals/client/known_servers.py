"""The servers that a client has heard of, also when the DHT has lost their records for a while."""

import time
from collections.abc import Callable, Iterable

from geopetals.swarm.records import ServerRecord

_KEPT_S = 600.0


class KnownServers:
    """The newest record of each server. Whether they still answer others find out."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: dict[str, tuple[ServerRecord, float]] = {}

    def update(self, records: Iterable[ServerRecord]) -> list[ServerRecord]:
        """What the DHT says now; returns who serves by that, or did when the DHT last knew of it."""
        now = self._clock()
        self._found |= {record.peer_id: (record, now) for record in records}
        self._found = {peer_id: found for peer_id, found in self._found.items() if now - found[1] <= _KEPT_S}
        return [record for record, _ in self._found.values() if record.is_online]
