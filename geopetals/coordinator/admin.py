"""What operators ask and order: over a control channel with an admin's token; `View` is also what HTTP shows."""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import geopetals
from geopetals.cluster_io import dump_cluster
from geopetals.coordinator import aside
from geopetals.coordinator.bounds import BoundWatch
from geopetals.coordinator.codec import MessageError
from geopetals.coordinator.core.events import ReplanAsked
from geopetals.coordinator.core.subject import Subject
from geopetals.coordinator.engine import Engine
from geopetals.coordinator.entrance import Entrance
from geopetals.coordinator.members import Members
from geopetals.coordinator.messages import check_shown
from geopetals.coordinator.packed import pack_answer
from geopetals.coordinator.store import Store
from geopetals.credentials.authority import TOKEN_LIFE_S
from geopetals.credentials.certificate import Role
from geopetals.credentials.ledger import TokenEntry
from geopetals.errors import ServerRefused

_FRESH_S = 0.25
_SHOWN = 500
_MAX_LIST = 1000
_MAX_TEXT = 200
_MAX_LIFE_S = 3650 * 86400.0


class View:
    """Facts about the swarm as plain values that JSON can hold. Nothing secret is among them."""

    def __init__(self, engine: Engine, entrance: Entrance, members: Members, store: Store, peer_id: str) -> None:
        self._engine, self._entrance, self._members, self._store = engine, entrance, members, store
        self._peer_id, self._started = peer_id, time.time()
        self.bound = BoundWatch(lambda: engine.core.subject(), aside.bound)
        self._status: dict[str, Any] = {}
        self._status_at = 0.0
        self._written_of: Subject | None = None
        self._written: Any = None

    def status(self) -> dict[str, Any]:
        """Of this moment or one just before, since many may ask. Long lists are cut; `running`, `waiting` are whole."""
        if not self._status or abs(time.time() - self._status_at) > _FRESH_S:
            self._status, self._status_at = self._make_status(), time.time()
        return self._status

    def _make_status(self) -> dict[str, Any]:
        facts, now = self._entrance.facts, self._engine.now()
        roles = [member.role for member in self._members.where(lambda member: True)]
        coordinator = {
            "release": geopetals.__version__,
            "peer": self._peer_id,
            "swarm": facts.swarm,
            "model": facts.model,
            "blocks": facts.num_blocks,
            "open": facts.is_open,
            "now": now,
            "up_s": max(0.0, time.time() - self._started),
            "events": self._engine.events,
            "trust_version": self._entrance.authority.trust.version,
            "connected": {role: roles.count(role) for role in ("server", "client", "admin", "relay")},
        }
        found = self._engine.core.status(now)
        cut = {name: found[name][:_SHOWN] for name in ("sessions", "queue")}
        totals = {"running": len(found["sessions"]), "waiting": len(found["queue"]), "bound_tpot_s": self.bound.tpot_s}
        status: dict[str, Any] = jsonable({"coordinator": coordinator, **found, **cut, **totals})
        return status

    async def plan(self) -> dict[str, Any]:
        """The plan in force, the cluster file it was made for, and the newest decisions."""
        status, cluster = self.status(), await self._cluster_file(self._engine.core.subject())
        return {
            "coordinator": status["coordinator"],
            "plan": status.get("plan"),
            "servers": status.get("servers"),
            "cluster": cluster,
            "history": self.history(20),
        }

    async def _cluster_file(self, subject: Subject | None) -> Any:
        """In a thread, and kept: for hundreds of servers it takes a second to write."""
        if subject is None:
            return None
        if subject is not self._written_of:
            written = await asyncio.to_thread(lambda: json.loads(dump_cluster(subject.cluster, as_json=True)))
            self._written_of, self._written = subject, written
        return self._written

    def history(self, limit: int) -> list[dict[str, Any]]:
        return self._store.history(min(limit, _MAX_LIST))

    def sessions(self, limit: int) -> list[dict[str, Any]]:
        return self._store.sessions(min(limit, _MAX_LIST))


class Admin:
    """Answers calls of members whose role is admin. Answers that are lists stand under `items`."""

    def __init__(self, view: View, engine: Engine, entrance: Entrance, changed: Callable[[], None]) -> None:
        """`changed` is called when trust has changed."""
        self._view, self._engine, self._authority = view, engine, entrance.authority
        self._changed = changed
        self._methods: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "status": self._status,
            "plan": self._plan,
            "history": self._history,
            "sessions": self._sessions,
            "replan": self._replan,
            "token.create": self._create_token,
            "token.list": self._list_tokens,
            "token.revoke": self._revoke_token,
            "token.rotate": self._rotate,
        }

    async def call(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        function = self._methods.get(method)
        if function is None:
            raise ServerRefused(f"the coordinator does not answer {method[:40]!r} of an admin.")
        return pack_answer(await function(body))

    async def _status(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._view.status()

    async def _plan(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self._view.plan()

    async def _history(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"items": self._view.history(_limit(body))}

    async def _sessions(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"items": self._view.sessions(_limit(body))}

    async def _replan(self, body: dict[str, Any]) -> dict[str, Any]:
        await self._engine.settle(ReplanAsked(reason=_text(body, "reason")))
        return {"asked": True}

    async def _create_token(self, body: dict[str, Any]) -> dict[str, Any]:
        role, life_s = _text(body, "role"), body.get("life_s", TOKEN_LIFE_S)
        if role not in {known.value for known in Role}:
            raise MessageError("a token's role is server, client, admin or relay")
        if type(life_s) not in (int, float) or not 0 < life_s <= _MAX_LIFE_S:
            raise MessageError(f"life_s is above 0 and at most {_MAX_LIFE_S:.0f}")
        token = self._authority.create_token(Role(role), name=_text(body, "name"), life_s=float(life_s))
        return {"token": token.encode(), "id": token.token_id, "expires_at": token.expires_at}

    async def _list_tokens(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"items": [_entry(entry) for entry in self._authority.tokens()]}

    async def _revoke_token(self, body: dict[str, Any]) -> dict[str, Any]:
        entry = self._authority.revoke(_text(body, "id"))
        self._changed()
        return _entry(entry)

    async def _rotate(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("retire") is True:
            return {"retired": self._authority.retire()}
        return {"key": self._authority.rotate()}


def _entry(entry: TokenEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "role": entry.role.value,
        "name": entry.name,
        "created_at": entry.created_at,
        "expires_at": entry.expires_at,
        "revoked_at": entry.revoked_at,
    }


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key, "")
    if not isinstance(value, str):
        raise MessageError(f"{key} is a text")
    check_shown(value, key, _MAX_TEXT)
    return value


def _limit(body: dict[str, Any]) -> int:
    value = body.get("limit", 100)
    if type(value) is not int or not 1 <= value <= _MAX_LIST:
        raise MessageError(f"limit is a number from 1 to {_MAX_LIST}")
    return value


def jsonable(value: Any) -> Any:
    """JSON knows no infinity: what is not finite is told as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    return value
