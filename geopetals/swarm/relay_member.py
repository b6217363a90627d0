"""A relay's membership in a swarm with a coordinator: by its certificate others know that its record is a relay's."""

import logging
import time
from typing import Any

from geopetals.coordinator.messages import VERSION, Hello, Welcome
from geopetals.errors import ControlLost
from geopetals.swarm.control import dial
from geopetals.swarm.membership import Membership
from geopetals.swarm.network import GuardedP2P
from geopetals.swarm.redial import connect
from geopetals.swarm.wire import WireError

log = logging.getLogger(__name__)

_AGAIN_S = 600.0


class RelayMember:
    """Says hello to the coordinator, and again every ten minutes."""

    def __init__(self, membership: Membership) -> None:
        assert membership.token.coordinator is not None
        self._membership = membership
        self._coordinator = membership.token.coordinator
        self._last = float("-inf")

    async def keep(self, p2p: GuardedP2P) -> bool:
        """Say hello if it is time to; False if the coordinator does not answer. Raises NotAdmitted."""
        if time.monotonic() - self._last < _AGAIN_S:
            return True
        try:
            await self._say_hello(p2p)
        except ControlLost as error:
            log.info("coordinator.lost reason=%.300s", error)
            return False
        self._last = time.monotonic()
        return True

    async def _say_hello(self, p2p: GuardedP2P) -> None:
        await connect(p2p, self._coordinator.addresses)
        channel = await dial(p2p, self._coordinator.peer_id, on_call=_refuse, on_notify=_ignore)
        try:
            hello = Hello(version=VERSION, role="relay", token=self._membership.token.credential)
            welcome = Welcome.from_dict(await channel.call("hello", hello.to_dict()))
        except ValueError as error:
            raise ControlLost(f"the coordinator's welcome cannot be read ({error}).") from error
        finally:
            channel.close()
        self._membership.welcomed(welcome.certificate, welcome.trust)


async def _refuse(method: str, body: dict[str, Any]) -> dict[str, Any]:
    raise WireError(f"a relay does not answer {method[:40]!r}")


def _ignore(method: str, body: dict[str, Any]) -> None:
    """A relay is told nothing that it did not ask for."""
