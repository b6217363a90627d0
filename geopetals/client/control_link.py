"""A channel to the coordinator that is dialled again whenever it ends."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from hivemind.p2p import P2P

from geopetals.coordinator.codec import Message, MessageError
from geopetals.errors import ControlLost, GeoPetalsError, NotAdmitted, SwarmFailure, SwarmMismatch, TokenError
from geopetals.swarm.control import ControlChannel, OnNotify, dial
from geopetals.swarm.relay_protocol import UNREACHABLE
from geopetals.swarm.wire import short_peer

log = logging.getLogger(__name__)

Answer = TypeVar("Answer", bound=Message)
_CONNECT_TIMEOUT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
_REFUSED_PAUSE_S = 60.0
_REFUSALS = (NotAdmitted, SwarmMismatch, TokenError)


class ControlLink:
    """Lives on the event loop that made it, from `start()` to `close()`."""

    def __init__(
        self,
        p2p: P2P,
        coordinator: str,
        addresses: tuple[str, ...],
        *,
        patience_s: float,
        introduce: Callable[[ControlChannel], Awaitable[None]],
        attend: Callable[[ControlChannel], Coroutine[Any, Any, None]],
        on_notify: OnNotify,
    ) -> None:
        """`coordinator` is its peer id. `patience_s`: how long a lost one is waited for before it counts as away.

        `introduce` says on a new channel what has to be said first; `attend` looks after the channel then, until it is
        cancelled. Whatever they raise ends the channel.
        """
        self._p2p, self._coordinator, self._addresses = p2p, coordinator, addresses
        self._patience_s = patience_s
        self._introduce, self._attend, self._on_notify = introduce, attend, on_notify
        self.channel: ControlChannel | None = None
        self._refusal: GeoPetalsError | None = None
        self._answered = asyncio.Event()
        self._lost_at = time.monotonic()
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._keeping = asyncio.create_task(self._keep())

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def reach(self) -> ControlChannel:
        """The channel, waited for as long as a restart may take. Raises ControlLost, or why this peer is refused."""
        if self.channel is not None and self.channel.closed.is_set():
            self._lose(self.channel)
        left_s = self._lost_at + self._patience_s - time.monotonic()
        if not self._answered.is_set() and left_s > 0:
            try:
                async with asyncio.timeout(left_s):
                    await self._answered.wait()
            except TimeoutError:
                log.debug("coordinator.waited seconds=%.1f", left_s)
        if self.channel is not None:
            return self.channel
        raise self._refusal or ControlLost(f"the coordinator {short_peer(self._coordinator)} does not answer.")

    async def _keep(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._connect_once()
                pause_s = _FIRST_PAUSE_S
            except _REFUSALS as error:
                log.warning("coordinator.refused reason=%s", error)
                self._refusal = error
                self._answered.set()
                pause_s = _REFUSED_PAUSE_S
            except (GeoPetalsError, ValueError, OSError, *UNREACHABLE) as error:  # of `introduce` and `attend`, too
                level = logging.INFO if pause_s == _FIRST_PAUSE_S else logging.DEBUG
                log.log(level, "coordinator.lost reason=%s", error)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _connect_once(self) -> None:
        """Dial, and return when the channel has ended."""
        await self._find()
        channel = await dial(self._p2p, self._coordinator, on_call=_refuse_calls, on_notify=self._hear)
        try:
            await self._introduce(channel)
            self.channel, self._refusal = channel, None
            self._answered.set()
            log.info("coordinator.connected coordinator=%s", short_peer(self._coordinator))
            attending = asyncio.create_task(self._attend(channel))
            ended = asyncio.create_task(channel.closed.wait())
            try:
                await asyncio.wait((attending, ended), return_when=asyncio.FIRST_COMPLETED)
            finally:
                attending.cancel()
                ended.cancel()
            if attending.done():
                attending.result()
        finally:
            channel.close()
            self._lose(channel)

    def _lose(self, channel: ControlChannel) -> None:
        if self.channel is channel:
            self.channel, self._lost_at = None, time.monotonic()
            self._answered.clear()

    async def _find(self) -> None:
        for address in self._addresses:
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    await self._p2p.connect(address)
            except Exception as error:  # noqa: BLE001 - dial() says what is wrong, if anything is
                log.debug("coordinator.address address=%s reason=%r", address, error)
            else:
                return

    def _hear(self, method: str, body: dict[str, Any]) -> None:
        """What cannot be read is passed over: the coordinator may be newer."""
        try:
            self._on_notify(method, body)
        except MessageError as error:
            log.info("coordinator.unread method=%.40s reason=%s", method, error)


async def call(channel: ControlChannel, method: str, message: Message, kind: type[Answer]) -> Answer:
    """Raises what the coordinator refuses with, or ControlLost."""
    answer = await channel.call(method, message.to_dict())
    try:
        return kind.from_dict(answer)
    except MessageError as error:
        channel.close()
        raise ControlLost(f"the coordinator answered {method} with what is no answer: {error}.") from error


async def _refuse_calls(method: str, body: dict[str, Any]) -> dict[str, Any]:
    raise SwarmFailure("clients answer no calls.")
