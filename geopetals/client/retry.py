"""When a step that failed is tried again, on which grounds it is given up."""

import asyncio
import logging
import time

from geopetals.client.config import ClientConfig
from geopetals.errors import NoChain, ServerBroken, ServerFull, ServerGone, ServerRefused, SwarmFailure

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 1.0


_REASONS = {
    NoChain: "no_chain",
    ServerFull: "full",
    ServerGone: "gone",
    ServerBroken: "broken",
    ServerRefused: "refused",
}


def failure_reason(error: SwarmFailure) -> str:
    """In a word, for metrics."""
    return next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), "other")


class Retry:
    """The attempts at one step. A full swarm is waited for, so are missing blocks in the middle of a session; other
    failures are counted. Whatever it is, it ends.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._began_s = time.monotonic()
        self.attempts = 0

    async def after(self, error: SwarmFailure, *, in_session: bool) -> None:
        """Returns when another try makes sense, raises `error` when none does."""
        config, self.attempts = self._config, self.attempts + 1
        waited_s = time.monotonic() - self._began_s
        if isinstance(error, NoChain) and in_session:
            if waited_s >= config.recovery_timeout:
                raise error
        elif isinstance(error, ServerFull):
            if waited_s >= config.full_timeout:
                raise error
        elif isinstance(error, ServerRefused | NoChain) or self.attempts > config.max_retries:
            raise error
        log.warning("session.retry attempt=%d reason=%s", self.attempts, error)
        if isinstance(error, NoChain):
            await asyncio.sleep(min(_LOOK_AGAIN_S, config.max_backoff))
        elif self.attempts > 1:
            await asyncio.sleep(min(config.min_backoff * 2 ** (self.attempts - 2), config.max_backoff))
