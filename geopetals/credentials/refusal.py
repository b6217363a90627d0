"""Why a credential is refused."""

from enum import StrEnum

from geopetals.errors import NotAdmitted


class Refusal(StrEnum):
    """In a word, for metrics and tests; the sentence beside it is for people."""

    MISSING = "missing"
    MALFORMED = "malformed"
    FORGED = "forged"
    UNKNOWN_KEY = "unknown_key"
    FOREIGN_SWARM = "foreign_swarm"
    FOREIGN_MODEL = "foreign_model"
    FOREIGN_PEER = "foreign_peer"
    WRONG_ROLE = "wrong_role"
    WRONG_BLOCKS = "wrong_blocks"
    EXPIRED = "expired"
    NOT_YET = "not_yet"
    REVOKED = "revoked"
    REPLAYED = "replayed"
    TOO_LARGE = "too_large"


def refused(refusal: Refusal, text: str) -> NotAdmitted:
    return NotAdmitted(text, reason=refusal.value)
