"""What a member of a swarm with a coordinator trusts, shows to others and asks of them. Lives on the event loop."""

import asyncio
import logging

from geopetals.credentials.authority import Authority
from geopetals.credentials.ticket import digest_of
from geopetals.credentials.trust import Trust, TrustSource
from geopetals.errors import NotAdmitted
from geopetals.join_token import JoinToken
from geopetals.swarm.gate import Gate, OpenGate, TicketGate
from geopetals.swarm.network import Network
from geopetals.swarm.record_signing import SignedRecords
from geopetals.swarm.trust_exchange import keep_trust_current

log = logging.getLogger(__name__)


class Membership:
    """Of one process. `records` is the validator for its DHT node, None in swarms that are open to stock PETALS.

    `certificate` is empty before the coordinator has welcomed this peer for the first time.
    """

    def __init__(self, token: JoinToken, *, identity: bytes | None = None) -> None:
        """`token`: of version 2. `identity`: this peer's libp2p key, if it writes records."""
        self.token = token
        self.trust = TrustSource(token.trust)
        self.records = None if token.open else SignedRecords(self.trust, identity=identity)
        self.certificate = b""

    def welcomed(self, certificate: bytes, trust: bytes) -> None:
        """What the coordinator answered to `hello`. Raises NotAdmitted if the swarm's keys do not vouch for it."""
        self.trust.offer(trust)
        self.certificate = certificate
        if self.records is not None:
            self.records.certificate = certificate

    def heard(self, trust: bytes) -> None:
        """A trust list from the coordinator; one that is forged is passed over."""
        try:
            if self.trust.offer(trust):
                log.info("trust.changed version=%d", self.trust.current.version)
        except NotAdmitted as error:
            log.warning("trust.refused reason=%s", error)

    def make_gate(self) -> Gate:
        """For a block server; one for as long as the membership lasts: it knows which tickets are in use."""
        tickets = TicketGate(self.trust, swarm=self.token.swarm, model_digest=digest_of(self.token.identity))
        return OpenGate(tickets) if self.token.open else tickets

    def keep_current(self, network: Network) -> "asyncio.Task[None]":
        """Learn of rotation and revocation from the DHT, too, until the task is cancelled."""
        return asyncio.create_task(keep_trust_current(network.node, self.trust))


class OwnMembership:
    """The coordinator's end of what members trust: it vouches for itself, and keeps the list in the DHT current."""

    def __init__(self, authority: Authority, *, swarm: str, is_open: bool) -> None:
        self._authority = authority
        self.trust = TrustSource(Trust(swarm=swarm, keys=authority.keys, open=is_open))
        self.records = None if is_open else SignedRecords(self.trust)

    async def keep_published(self, network: Network) -> None:
        """Until cancelled; once the swarm has been described to the authority."""
        await keep_trust_current(network.node, self.trust, ours=self._authority.signed_trust)
