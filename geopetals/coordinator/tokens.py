"""The join tokens that a coordinator prints: made once, kept beside its keys, made again when they are out of date."""

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from geopetals.credentials.authority import Authority
from geopetals.credentials.certificate import Role
from geopetals.errors import TokenError, UnsupportedInput
from geopetals.join_token import JoinToken

STANDING_ROLES = (Role.SERVER, Role.CLIENT, Role.ADMIN)
_LEAST_LEFT_S = 86400.0
_NAME = "standing"


def token_file(state: Path, role: Role) -> Path:
    return state / f"{role.value}.token"


def hand_out(tokens: Mapping[str, str], folder: Path) -> None:
    """Write the tokens of servers and clients where others of this machine, or its containers, find them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for role in (Role.SERVER, Role.CLIENT):
            _write(folder / f"{role.value}.token", tokens[role.value])
    except OSError as error:
        raise UnsupportedInput(
            f"cannot write tokens into {folder} ({error.strerror}): choose another --tokens."
        ) from error


def standing_tokens(authority: Authority, state: Path) -> dict[str, str]:
    """By role. Files that only their owner can read."""
    return {role.value: _standing(authority, token_file(state, role), role) for role in STANDING_ROLES}


def _standing(authority: Authority, file: Path, role: Role) -> str:
    with contextlib.suppress(OSError, TokenError):
        text = file.read_text().strip()
        if _is_current(authority, JoinToken.decode(text)):
            return text
    token = authority.create_token(role, name=_NAME).encode()
    _write(file, token)
    return token


def _write(file: Path, token: str) -> None:
    """Readable by its owner alone, and never half of it."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(token)
    unfinished.rename(file)


def _is_current(authority: Authority, token: JoinToken) -> bool:
    """Whether whoever pastes it now joins this swarm where it is."""
    facts = authority.facts
    usable = any(entry.id == token.token_id and entry.revoked_at is None for entry in authority.tokens())
    return (
        usable
        and facts is not None
        and token.expires_at > time.time() + _LEAST_LEFT_S
        and token.coordinator is not None
        and token.coordinator.addresses == facts.addresses
        and token.relays == facts.relays
        and token.open == facts.open
        and set(token.keys) == set(authority.trust.keys)
    )
