"""Sessions that need more attention cache than they reserved at first."""

from geopetals.credentials.refusal import Refusal, refused
from geopetals.errors import MemoryShortage, ServerFull
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.gate import Grant
from geopetals.swarm.kv_budget import Reservation
from geopetals.swarm.kv_cache import SessionKV

_LEAST_TOKENS = 256
_SHARE = 4


class CacheGrowth:
    """Makes room in one session's cache, up to `limit` tokens.

    Growing copies what is held: it goes in steps of a quarter of the present length, 256 tokens at least, so that over
    a long session each token is copied about four times. Where so much is not free, what is needed now will do.
    """

    def __init__(
        self, kv: SessionKV, reservation: Reservation, compute: ComputeThread, *, limit: int, grant: Grant | None = None
    ) -> None:
        """`grant`: the session's leave to be here, which may be for less than `limit`."""
        self._kv, self._reservation, self._compute, self._limit = kv, reservation, compute, limit
        self._grant = grant if grant is not None else Grant()

    async def make_room(self, tokens: int, *, timeout_s: float = 0.0) -> None:
        """Let `tokens` more fit. Not while a step of the session is computed.

        Raises ServerFull if that much cache does not come free in `timeout_s`, and NotAdmitted if the session's ticket
        is for less.
        """
        needed = self._kv.length + tokens
        if needed <= self._kv.max_length:
            return
        if needed > self._limit:
            raise ServerFull(f"a session on this server has at most {self._limit} tokens, {needed} are needed.")
        granted = self._grant.longest(self._limit)
        if needed > granted:
            raise refused(Refusal.TOO_LARGE, f"the ticket is for {granted} tokens, the session needs {needed}.")
        step = max(_LEAST_TOKENS, self._kv.max_length // _SHARE)
        wanted = min(granted, max(needed, self._kv.max_length + step))
        try:
            await self._grow(wanted, 0.0)
        except ServerFull:
            await self._grow(needed, timeout_s)

    async def _grow(self, max_length: int, timeout_s: float) -> None:
        kv = self._kv
        more = (max_length - kv.max_length) * kv.batch * (kv.end - kv.start)
        await self._reservation.grow(more, timeout_s=timeout_s)
        try:
            await self._compute.run(lambda: kv.grow(max_length))
            self._grant.grown(max_length)
        except MemoryShortage as error:
            self._reservation.shrink(more)
            raise ServerFull(str(error)) from error
