"""A server of a swarm with a coordinator: it says what it can do, and holds what it is told to."""

import logging

from geopetals.coordinator.messages import Limits, Profile, Span
from geopetals.swarm.assignments import Assignments, Work
from geopetals.swarm.dht_peers import meet
from geopetals.swarm.holding import Holding
from geopetals.swarm.member import Member, Self
from geopetals.swarm.membership import Membership
from geopetals.swarm.records import ServerRecord, read_servers, require_same_weights
from geopetals.swarm.self_measurement import throughput_of
from geopetals.swarm.server_config import ServerConfig
from geopetals.swarm.server_parts import ServerParts, together

log = logging.getLogger(__name__)


class CoordinatedServer:
    """`run()` until cancelled; `leave()` before that tells the coordinator."""

    def __init__(self, parts: ServerParts, membership: Membership, profile: Profile) -> None:
        self._parts, self._membership, self._speed = parts, membership, throughput_of(profile)
        self._told: tuple[int, int] | None = None
        work = Work(
            load=self._load,
            serve=lambda holding: parts.serve(holding, self._speed),
            drain=self._drain,
            resume=self._resume,
            stop=parts.service.stop,
        )
        self._assignments = Assignments(work, parts.reporter, self._changed)
        self._member = Member(
            membership,
            Self(
                identity=parts.identity,
                profile=profile,
                limits=limits_of(parts.config, profile),
                name=parts.config.name or "",
            ),
            place=parts.place,
            service=parts.service,
            assignments=self._assignments,
            reporter=parts.reporter,
            on_connected=self._connected,
        )
        parts.listing.links = self._member.links

    async def run(self) -> None:
        """Raises NotAdmitted and SwarmMismatch if the server may not join."""
        trusting = self._membership.keep_current(self._parts.place.network)

        async def back() -> None:
            nonlocal trusting
            trusting.cancel()
            trusting = self._membership.keep_current(self._parts.place.network)

        try:
            await together(self._member.run(), self._assignments.run(), self._parts.keep_place(back))
        finally:
            trusting.cancel()

    async def leave(self) -> None:
        await self._member.leave()

    async def _load(self, start: int, end: int) -> Holding:
        parts = self._parts
        await parts.listing.joining(start, end)
        holding = await parts.loader.load(start, end)
        require_same_weights(await self._other_servers(), holding.block_hashes)
        return holding

    async def _other_servers(self) -> list[ServerRecord]:
        parts, network = self._parts, self._parts.place.network
        try:
            servers = await read_servers(network.node, parts.swarm, parts.loader.checkpoint.num_blocks)
        except Exception as error:  # noqa: BLE001 - p2pd may have died: those who use the blocks compare hashes, too
            log.warning("records.not_read reason=%r", error)
            return []
        return [server for server in servers if server.peer_id != network.peer_id]

    async def _drain(self, reason: str, timeout_s: float) -> None:
        await self._parts.listing.offline()
        await self._parts.service.drain(reason, timeout_s)

    async def _resume(self) -> None:
        parts = self._parts
        parts.service.resume()
        if parts.service.holding is not None:
            await parts.listing.online(parts.service.holding, self._speed, parts.service.free_block_tokens)

    def _changed(self) -> None:
        self._member.changed()
        holding = self._parts.service.holding
        if self._assignments.standing.state != "ready" or holding is None:
            self._told = None
        elif holding.span != self._told:
            self._told = holding.span
            self._parts.tell_ready(holding, "")

    async def _connected(self) -> None:
        """A coordinator that was away has forgotten the DHT's nodes, and the records of which it holds a part."""
        coordinator = self._membership.token.coordinator
        assert coordinator is not None
        await meet(self._parts.place.network.node, [coordinator.peer_id])
        await self._parts.listing.renew()


def limits_of(config: ServerConfig, profile: Profile) -> Limits:
    return Limits(
        pin=None if config.blocks is None else Span(*config.blocks),
        max_blocks=config.count,
        memory_bytes=profile.memory_bytes,
    )
