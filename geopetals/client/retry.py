"""When a step that failed is tried again, on which grounds it is given up."""

import asyncio
import logging
import time

from geopetals.client.config import ClientConfig
from geopetals.credentials.refusal import Refusal
from geopetals.errors import (
    Busy,
    NoChain,
    NotAdmitted,
    ServerBroken,
    ServerFull,
    ServerGone,
    ServerMoving,
    ServerRefused,
    SwarmFailure,
)

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 1.0


_REASONS = {
    NoChain: "no_chain",
    ServerMoving: "moving",
    ServerFull: "full",
    ServerGone: "gone",
    ServerBroken: "broken",
    NotAdmitted: "not_admitted",
    ServerRefused: "refused",
}


def failure_reason(error: SwarmFailure) -> str:
    """In a word, for metrics."""
    return next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), "other")


_PASSING = {Refusal.EXPIRED, Refusal.UNKNOWN_KEY, Refusal.REPLAYED, Refusal.TOO_LARGE}
"""Why a server may refuse a ticket that another one, or a newer ticket, or a moment later helps against."""


def _is_final(error: SwarmFailure) -> bool:
    if isinstance(error, NotAdmitted):
        return error.reason not in _PASSING
    return isinstance(error, Busy | ServerRefused | NoChain)


class Retry:
    """The attempts at one step. A full swarm is waited for, so are missing blocks in the middle of a session; other
    failures are counted. Whatever it is, it ends.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._failures = self._waits = 0
        self._waiting_since_s = 0.0
        self.attempts = 0

    async def after(self, error: SwarmFailure, *, in_session: bool) -> None:
        """Returns when another try makes sense, raises `error` when none does.

        Time counts from the first of the waits in a row: not what was computed before, however long it took.
        """
        config, now_s = self._config, time.monotonic()
        self.attempts += 1
        if isinstance(error, ServerFull) or (isinstance(error, NoChain) and in_session):
            if self._waits == 0:
                self._waiting_since_s = now_s
            self._waits += 1
            tries = self._waits
            limit_s = config.full_timeout if isinstance(error, ServerFull) else config.recovery_timeout
            if in_session:
                limit_s = max(limit_s, config.recovery_timeout)
            if now_s - self._waiting_since_s >= limit_s:
                raise error
        else:
            self._waits = 0
            self._failures += 1
            tries = self._failures
            if _is_final(error) or self._failures > config.max_retries:
                raise error
        log.warning("session.retry attempt=%d reason=%s", self.attempts, error)
        if isinstance(error, NoChain):
            await asyncio.sleep(min(_LOOK_AGAIN_S, config.max_backoff))
        elif tries > 1:
            await asyncio.sleep(min(config.min_backoff * 2 ** (tries - 2), config.max_backoff))
