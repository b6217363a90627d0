"""The coordinator's secrets and what it gave out, in one file that only its owner can read.

The running coordinator and `geopetals token` may write it at the same time: each change is made under a lock to the
newest contents, and the file is replaced whole.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from geopetals.credentials.certificate import Role
from geopetals.credentials.keys import SigningKey
from geopetals.errors import TokenError

_FILE, _LOCK = "credentials.json", "credentials.lock"
_LOCK_TIMEOUT_S = 10.0
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEntry:
    """One join token that was made, without what would let anybody use it. Times are Unix times in seconds."""

    id: str
    role: Role
    name: str
    created_at: float
    expires_at: float
    key_id: str
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmFacts:
    """What a join token says besides the credential: the running coordinator keeps it up to date."""

    swarm: str
    model: str
    identity: dict[str, str | None]
    coordinator_peer_id: str
    addresses: tuple[str, ...]
    peers: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()
    open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """`keys`: those in use, oldest first; the last one signs. `version` counts what changes whom the swarm trusts."""

    keys: tuple[SigningKey, ...] = field(repr=False)
    version: int
    tokens: tuple[TokenEntry, ...] = ()
    facts: SwarmFacts | None = None

    def to_json(self) -> str:
        contents = {
            "format": _FORMAT,
            "version": self.version,
            "keys": [key.secret().hex() for key in self.keys],
            "tokens": [asdict(entry) for entry in self.tokens],
            "swarm": None if self.facts is None else asdict(self.facts),
        }
        return json.dumps(contents, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Ledger":
        contents: dict[str, Any] = json.loads(text)
        if contents["format"] != _FORMAT:
            raise ValueError(f"format {contents['format']} is not known")
        tokens = [TokenEntry(**{**entry, "role": Role(entry["role"])}) for entry in contents["tokens"]]
        return cls(
            keys=tuple(SigningKey(bytes.fromhex(secret)) for secret in contents["keys"]),
            version=int(contents["version"]),
            tokens=tuple(tokens),
            facts=_read_facts(contents["swarm"]),
        )


def _read_facts(fields: dict[str, Any] | None) -> SwarmFacts | None:
    if fields is None:
        return None
    lists = {key: tuple(fields[key]) for key in ("addresses", "peers", "relays")}
    return SwarmFacts(**{**fields, **lists})


class LedgerFile:
    """The ledger of one coordinator's state folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _FILE
        self._lock = FileLock(folder / _LOCK, timeout=_LOCK_TIMEOUT_S, mode=0o600)

    def load(self) -> Ledger | None:
        """None if there is none yet. Raises TokenError for a file that cannot be used."""
        try:
            return Ledger.from_json(self.path.read_text())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TokenError(
                f"cannot read {self.path} ({error.strerror}): run this as the coordinator's user."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise TokenError(f"{self.path} is damaged: restore it from a backup.") from error

    @contextmanager
    def changing(self) -> Iterator["LedgerChange"]:
        """The newest contents, under the lock; what `ledger` is set to is written when the block ends well."""
        try:
            with self._lock:
                change = LedgerChange(self.load())
                yield change
                if change.ledger is not None and change.ledger is not change.before:
                    self._write(change.ledger)
        except OSError as error:
            raise TokenError(
                f"cannot write {self.path} ({error.strerror or error}): choose another --state."
            ) from error

    def stamp(self) -> tuple[int, int]:
        """Differs once the file has been replaced."""
        try:
            status = self.path.stat()
        except OSError:
            return (0, 0)
        return (status.st_mtime_ns, status.st_ino)

    def _write(self, ledger: Ledger) -> None:
        unfinished = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        unfinished.unlink(missing_ok=True)
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(ledger.to_json())
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self.path)


class LedgerChange:
    """`before` as it was read, `ledger` as it shall be."""

    def __init__(self, before: Ledger | None) -> None:
        self.before = self.ledger = before

    def update(self, **fields: Any) -> None:
        assert self.ledger is not None
        self.ledger = replace(self.ledger, **fields)
