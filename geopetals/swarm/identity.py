"""Who must be equal for two processes to serve the same model."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from geopetals.errors import SwarmMismatch

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_MAX_NAME = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What a process knows about its model; None is what it could not know.

    `revision` is the Hub commit; `fingerprint` samples every tensor of the checkpoint, and is only known where every
    shard is at hand. Equal fingerprints outweigh revisions and names: a commit need not touch the weights.
    """

    model: str
    config_hash: str
    revision: str | None
    fingerprint: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.isprintable() or not 0 < len(self.model) <= _MAX_NAME:
            raise SwarmMismatch(f"a model's name must be 1 to {_MAX_NAME} printable characters; ask for a new record.")
        _require("config_hash", self.config_hash, _SHA256)
        if self.revision is not None:
            _require("revision", self.revision, _COMMIT)
        if self.fingerprint is not None:
            _require("fingerprint", self.fingerprint, _SHA256)

    def conflict(self, other: "ModelIdentity") -> str | None:
        """One sentence that names what differs, or None when nothing that both know differs."""
        if self.config_hash != other.config_hash:
            return f"the model is {other.model} there and {self.model} here: their configurations differ."
        if self.fingerprint is not None and other.fingerprint is not None:
            if self.fingerprint == other.fingerprint:
                return None
            return f"the weights of {other.model} there differ from those of {self.model} here."
        if self.revision is not None and other.revision is not None:
            if self.revision == other.revision:
                return None
            return f"{self.model} is at revision {other.revision[:12]} there and at {self.revision[:12]} here."
        return None

    def to_dict(self) -> dict[str, str | None]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> "ModelIdentity":
        """Raises `SwarmMismatch` for anything that `to_dict` could not have made: the data may come from anybody."""
        fields = ("model", "config_hash", "revision", "fingerprint")
        if not isinstance(data, Mapping) or set(data) != set(fields):
            raise SwarmMismatch("a model's identity must hold exactly " + ", ".join(fields) + "; ask for a new record.")
        return cls(**{field: data[field] for field in fields})


def _require(field: str, value: object, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise SwarmMismatch(f"the {field} of a model's identity is not a hash in hexadecimal; ask for a new record.")
