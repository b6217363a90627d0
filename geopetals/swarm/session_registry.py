"""The sessions of a server by their ids: what pushes from other servers are found by."""

import asyncio
from contextlib import AsyncExitStack
from typing import TypeVar

from geopetals.swarm.ring_session import RingSession
from geopetals.swarm.server_session import ServerSession
from geopetals.swarm.wire import WireError

AnySession = ServerSession | RingSession
Kind = TypeVar("Kind", ServerSession, RingSession)
_MAX_WAITING = 1024


class SessionRegistry:
    """Ids are chosen by clients, at random; to know one is no permission to push into a RingSession."""

    def __init__(self) -> None:
        self._sessions: dict[str, AnySession | None] = {}
        self._waiting: dict[str, asyncio.Future[RingSession]] = {}

    def claim(self, session_id: str, held: AsyncExitStack) -> None:
        """Take the id before anything is awaited: two clients may ask for the same one at once."""
        if session_id in self._sessions:
            raise WireError("this session id is in use")
        self._sessions[session_id] = None
        held.callback(self._sessions.pop, session_id, None)

    def put(self, session_id: str, session: AnySession) -> None:
        self._sessions[session_id] = session
        waiting = self._waiting.pop(session_id, None)
        if waiting is not None and not waiting.done() and isinstance(session, RingSession):
            waiting.set_result(session)

    def find(self, session_id: str, kind: type[Kind]) -> Kind | None:
        session = self._sessions.get(session_id)
        return session if isinstance(session, kind) else None

    async def wait_for(self, session_id: str, timeout_s: float) -> RingSession | None:
        """The session once it is open: the previous server may be quicker than the client."""
        session = self.find(session_id, RingSession)
        if session is not None:
            return session
        if session_id in self._waiting or len(self._waiting) >= _MAX_WAITING:
            return None
        self._waiting[session_id] = waiting = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                opened: RingSession = await waiting
                return opened
        except TimeoutError:
            return None
        finally:
            self._waiting.pop(session_id, None)
