"""`hello`: who may join, and what a member is told and given when it does."""

from collections.abc import Callable
from dataclasses import dataclass

from geopetals.coordinator import messages
from geopetals.coordinator.core.actions import Admitted
from geopetals.coordinator.messages import Hello, Welcome
from geopetals.credentials.authority import Authority
from geopetals.credentials.certificate import Certificate, Role
from geopetals.credentials.refusal import Refusal, refused
from geopetals.credentials.ticket import Ticket, TicketKind, digest_of
from geopetals.errors import ServerRefused
from geopetals.swarm.identity import ModelIdentity

_TICKET_LEAST_S, _TICKET_TIMES = 3600.0, 4.0
"""A ticket opens caches for so long, or so many times what its session should take: recovery needs it until then."""
_STANDBY_S = 6 * 3600.0
_STANDBY_TOKENS = 4096
_RESUME_S = 86400.0
"""After its ticket has expired a session can still be resumed for so long: it may run for longer than was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmFacts:
    """What every member is told."""

    swarm: str
    model: str
    identity: ModelIdentity
    num_blocks: int
    is_open: bool


class Entrance:
    """Checks credentials and signs certificates and tickets."""

    def __init__(self, authority: Authority, facts: SwarmFacts, *, clock: Callable[[], float]) -> None:
        self.authority, self.facts = authority, facts
        self._clock = clock
        self.digest = digest_of(facts.identity)

    def now(self) -> float:
        """Unix time, with which credentials expire; the engine's is another when this machine's clock was set."""
        return self._clock()

    def admit(self, hello: Hello, peer_id: str) -> Certificate:
        """Raises NotAdmitted, or ServerRefused for a member of another version."""
        if not messages.OLDEST <= hello.version <= messages.VERSION:
            raise ServerRefused(
                f"the coordinator speaks version {messages.VERSION} and this member {hello.version}: "
                "update geopetals where it is older."
            )
        if hello.certificate:
            certificate = self.authority.renew(hello.certificate, peer_id)
        else:
            certificate = self.authority.admit(hello.token, peer_id)
        if certificate.role not in (hello.role, Role.ADMIN):
            raise refused(
                Refusal.WRONG_ROLE, f"the join token is for a {certificate.role}, not for a {hello.role}: get another."
            )
        return certificate

    def welcome(self, certificate: Certificate, role: messages.Role) -> Welcome:
        return Welcome(
            certificate=self.authority.sign(certificate),
            trust=self.authority.signed_trust(),
            trust_version=self.authority.trust.version,
            swarm=self.facts.swarm,
            model=self.facts.model,
            identity=self.facts.identity.to_dict(),
            open=self.facts.is_open,
            heartbeat_s=messages.REPORT_S,
            now=self._clock(),
            standby=self.standby(certificate.peer_id, certificate.token_id) if role == "client" else b"",
        )

    def standby(self, client: str, token_id: str) -> bytes:
        """For sessions of a time without a coordinator."""
        return self._sign(client, token_id, "", 1, _STANDBY_TOKENS, _STANDBY_S, kind=TicketKind.STANDBY)

    def ticket(self, admitted: Admitted, token_id: str) -> bytes:
        """For the session that the core has admitted."""
        return self._sign(
            admitted.client,
            token_id,
            admitted.session_id,
            admitted.batch,
            admitted.max_tokens,
            max(_TICKET_LEAST_S, _TICKET_TIMES * admitted.predicted.end_to_end_s),
            chain=tuple((hop.peer_id, hop.start, hop.end) for hop in admitted.chain),
        )

    def read_ticket(self, data: bytes, client: str) -> Ticket:
        """Of a session that is resumed. Raises NotAdmitted."""
        return Ticket.verify(
            data,
            self.authority.trust,
            now=self._clock() - _RESUME_S,
            peer_id=client,
            swarm=self.facts.swarm,
            model_digest=self.digest,
        )

    def _sign(
        self,
        client: str,
        token_id: str,
        session_id: str,
        batch: int,
        max_length: int,
        life_s: float,
        *,
        kind: TicketKind = TicketKind.SESSION,
        chain: tuple[tuple[str, int, int], ...] = (),
    ) -> bytes:
        ticket = Ticket(
            swarm=self.facts.swarm,
            model_digest=self.digest,
            session_id=session_id,
            client_peer_id=client,
            blocks=(0, self.facts.num_blocks),
            max_length=max_length,
            batch=batch,
            expires_at=self._clock() + life_s,
            token_id=token_id,
            kind=kind,
            chain=chain,
        )
        return self.authority.sign(ticket)
