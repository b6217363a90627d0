"""Asking a running coordinator: over the swarm with an admin's token, or over HTTP."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from geopetals.coordinator import messages
from geopetals.coordinator.messages import Hello
from geopetals.coordinator.packed import unpack_answer
from geopetals.coordinator.tokens import token_file
from geopetals.credentials.certificate import Role
from geopetals.errors import NetworkError, SwarmFailure, TokenError, UnsupportedInput
from geopetals.join_token import JoinToken

_TIMEOUT_S = 15.0
_MOST_BYTES = 64 * 2**20


class Source(Protocol):
    """Where facts come from. Raises GeoPetalsError."""

    def ask(self, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]: ...


class HttpSource:
    """A coordinator's --http address. It answers `status`, `plan`, `history` and `sessions`."""

    def __init__(self, url: str, token: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise UnsupportedInput(f"{url!r} is no address: it looks like http://127.0.0.1:8470.")
        self._url, self._token = url.rstrip("/"), token

    def ask(self, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        limit = (body or {}).get("limit")
        address = f"{self._url}/{method}" + ("" if limit is None else f"?limit={limit}")
        headers = {} if self._token is None else {"authorization": f"Bearer {self._token}"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(address, headers=headers),
                timeout=_TIMEOUT_S,
            ) as answer:
                found: Any = json.loads(answer.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            raise SwarmFailure(f"{address} answers {error.code} {error.reason}: is --http-token right?") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise NetworkError(f"no coordinator answers at {self._url} ({reason}): is it running?") from error
        if not isinstance(found, dict):
            raise NetworkError(f"what answers at {self._url} is no coordinator: check the address.")
        return found


class SwarmSource:
    """The control channel. Each question joins the swarm for a moment; `watch` stays."""

    def __init__(self, token: JoinToken) -> None:
        """Raises TokenError for a token of a swarm without a coordinator."""
        if token.coordinator is None:
            raise TokenError("this swarm has no coordinator: the token was printed by `geopetals serve`.")
        if token.role is not Role.ADMIN:
            raise TokenError(f"this token is a {token.role}'s: use an admin's (`geopetals token create --role admin`).")
        self._token = token

    def ask(self, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return asyncio.run(self._ask(method, body or {}))

    async def _ask(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        from geopetals.swarm.control import dial
        from geopetals.swarm.network import Network, NetworkConfig

        coordinator = self._token.coordinator
        assert coordinator is not None
        network = await Network.start(NetworkConfig(initial_peers=coordinator.addresses, client_only=True))
        try:
            channel = await dial(network.p2p, coordinator.peer_id, on_call=_answer_nothing, on_notify=_hear_nothing)
            hello = Hello(version=messages.VERSION, role="admin", token=self._token.credential)
            await channel.call("hello", hello.to_dict())
            answer = unpack_answer(await channel.call(method, body, timeout_s=_TIMEOUT_S))
            channel.close()
            return answer
        finally:
            await network.stop()


async def _answer_nothing(method: str, body: dict[str, Any]) -> dict[str, Any]:
    raise UnsupportedInput(f"{method[:40]} is not answered here")


def _hear_nothing(method: str, body: dict[str, Any]) -> None:
    """Admins are not told anything that they have not asked for."""


def source_of(
    *, join: str | None, url: str | None, state: Path | None, http_token: str | None, default: Callable[[], Path]
) -> Source:
    """From what was given on the command line; nothing means a coordinator of this machine."""
    if url is not None:
        return HttpSource(url, http_token)
    if join is not None:
        return SwarmSource(JoinToken.decode(join))
    folder = state or default()
    file = token_file(folder, Role.ADMIN)
    try:
        text = file.read_text().strip()
    except OSError as error:
        raise UnsupportedInput(
            f"no coordinator has kept its state in {folder}: say --url, --join or --state."
        ) from error
    return SwarmSource(JoinToken.decode(text))
