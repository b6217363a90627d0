"""DHT records that only members can write, and each only its own: for swarms that are not open to stock PETALS.

A record stands under its writer's peer id, which contains an Ed25519 key. Its value is msgpack [payload, membership
certificate, signature]; the signature covers key, peer id, payload, certificate and expiry, so that a record can be
neither changed nor moved nor kept alive by others. Peers refuse to store or to read anything else, but for one plain
value: the swarm's trust list, which bears the coordinator's signature itself.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.proto import crypto_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time

from geopetals.credentials.certificate import Certificate, Role
from geopetals.credentials.keys import KEY_BYTES, SigningKey
from geopetals.credentials.peer_ids import key_of_peer, peer_of_key
from geopetals.credentials.refusal import Refusal, refused
from geopetals.credentials.trust import SKEW_S, Trust, TrustSource
from geopetals.errors import NotAdmitted
from geopetals.swarm.wire import short_peer

log = logging.getLogger(__name__)

MAX_RECORD_BYTES = 4096
MAX_LIFE_S = 600.0
TRUST_LIFE_S = 3600.0
"""After its date a trust list stays in the DHT for this long; a newer one outlives it, so that none can be put back."""
_MOST_MEMBERS = 4096
_MAY_WRITE = (Role.SERVER, Role.RELAY)


def trust_key(swarm: str) -> str:
    return f"_geopetals.trust.{swarm}"


class _Signed(NamedTuple):
    payload: bytes
    certificate: bytes
    signature: bytes


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]
    """hivemind's hook for one DHT node. Who has no certificate yet, or never gets one, reads only."""

    def __init__(
        self, trust: TrustSource, *, identity: bytes | None = None, clock: Callable[[], float] = get_dht_time
    ) -> None:
        """`identity`: the libp2p key of this peer, which signs; None for those who only read."""
        self.certificate = b""
        self.trust, self._clock = trust, clock
        self._key = None if identity is None else _signing_key(identity)
        self._peer_id = None if self._key is None else peer_of_key(self._key.public)
        self._trust_key = DHTID.generate(source=trust_key(trust.current.swarm)).to_bytes()
        self._members: dict[str, Certificate] = {}

    def is_member(self, peer_id: str) -> bool:
        """Whether the peer's last record was written by a member who still is one."""
        certificate = self._members.get(peer_id)
        if certificate is None:
            return False
        still_trusted = certificate.token_id not in self.trust.current.revoked
        return still_trusted and self._clock() <= certificate.expires_at + SKEW_S

    def validate(self, record: DHTRecord) -> bool:
        try:
            self.check(record)
        except NotAdmitted as error:
            log.debug("record.refused reason=%s", error)
            return False
        return True

    def check(self, record: DHTRecord) -> None:
        """Raises NotAdmitted for what may not stand in the DHT."""
        if record.key == self._trust_key:
            self._check_trust(record)
            return
        signed, peer_id = self._read(record)
        if record.expiration_time > self._clock() + MAX_LIFE_S + SKEW_S:
            raise refused(Refusal.NOT_YET, f"records live for at most {MAX_LIFE_S:.0f} s.")
        if not key_of_peer(peer_id).verifies(signed.signature, _message(record, signed)):
            raise refused(Refusal.FORGED, f"the record of {short_peer(peer_id)} was not written by that peer.")
        certificate = self._verify(signed.certificate, peer_id)
        if certificate.role not in _MAY_WRITE:
            raise refused(Refusal.WRONG_ROLE, f"a {certificate.role.value} writes no records.")
        self._remember(certificate)

    def sign_value(self, record: DHTRecord) -> bytes:
        value: bytes = record.value
        if self._key is None or not self.certificate or record.key == self._trust_key:
            return value
        unsigned = _Signed(value, self.certificate, b"")
        signature = self._key.sign(_message(record, unsigned))
        signed: bytes = msgpack.packb([*unsigned[:2], signature])
        return signed

    def strip_value(self, record: DHTRecord) -> bytes:
        value: bytes = record.value
        return value if record.key == self._trust_key else msgpack.unpackb(value)[0]

    def _read(self, record: DHTRecord) -> tuple[_Signed, str]:
        if len(record.value) > MAX_RECORD_BYTES:
            raise refused(Refusal.MALFORMED, f"a record has at most {MAX_RECORD_BYTES} bytes.")
        peer_id, parts = _unpack(record.subkey), _unpack(record.value)
        if not isinstance(peer_id, str) or not _is_key_of_peer(peer_id):
            raise refused(Refusal.MALFORMED, "a record stands under the peer id of its writer.")
        if not isinstance(parts, list) or len(parts) != 3 or not all(isinstance(part, bytes) for part in parts):
            raise refused(Refusal.MISSING, "the record is not signed by a member of this swarm.")
        signed = _Signed(*parts)
        _check_loadable(signed.payload)
        return signed, peer_id

    def _verify(self, certificate: bytes, peer_id: str) -> Certificate:
        return Certificate.verify(certificate, self.trust.current, now=self._clock(), peer_id=peer_id)

    def _remember(self, certificate: Certificate) -> None:
        if len(self._members) >= _MOST_MEMBERS:
            self._members = {peer: other for peer, other in self._members.items() if self.is_member(peer)}
        if len(self._members) < _MOST_MEMBERS:
            self._members[certificate.peer_id] = certificate

    def _check_trust(self, record: DHTRecord) -> None:
        if record.subkey != DHTProtocol.IS_REGULAR_VALUE:
            raise refused(Refusal.MALFORMED, "the trust list stands under no peer's name.")
        data = _unpack(record.value)
        if not isinstance(data, bytes):
            raise refused(Refusal.MALFORMED, "this is no trust list.")
        trust: Trust = self.trust.current.read(data)
        if record.expiration_time > trust.issued_at + TRUST_LIFE_S + SKEW_S:
            raise refused(Refusal.NOT_YET, "the trust list is to live longer than its date allows.")


def _message(record: DHTRecord, signed: _Signed) -> bytes:
    parts = [record.key, record.subkey, signed.payload, signed.certificate, float(record.expiration_time)]
    packed: bytes = msgpack.packb(parts)
    return b"geopetals/record/1\x00" + packed


def _signing_key(identity: bytes) -> SigningKey | None:
    """None for keys of other kinds, which earlier releases have made: their peers cannot write here."""
    message = crypto_pb2.PrivateKey.FromString(identity)
    return SigningKey(message.data[:KEY_BYTES]) if message.key_type == crypto_pb2.Ed25519 else None


def _is_key_of_peer(peer_id: str) -> bool:
    try:
        key_of_peer(peer_id)
    except ValueError:
        return False
    return True


def _unpack(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException, RecursionError):
        return None


def _check_loadable(payload: bytes) -> None:
    """What hivemind cannot load would leave a reader's search for the key without an end."""
    try:
        MSGPackSerializer.loads(payload)
    except Exception:  # noqa: BLE001 - extension types run code of hivemind's that may raise anything
        raise refused(Refusal.MALFORMED, "the record's payload is no valid msgpack.") from None
