"""`geopetals token`: who may join the swarm that a coordinator of this machine, or an admin's token, leads to."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from geopetals.cli import options

if TYPE_CHECKING:
    from geopetals.credentials.ledger import TokenEntry

HELP = "make, list and revoke the tokens with which others join"

_ROLES = ("server", "client", "admin", "relay")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="what to do", metavar="ACTION", required=True)
    create = _add(commands, "create", "print a new join token; whoever has it may join")
    create.add_argument("--role", choices=_ROLES, required=True, help="what its bearer may do")
    create.add_argument(
        "--expires",
        type=options.duration,
        default=30 * 86400.0,
        metavar="TIME",
        help="how long it can be used, like 7d, 12h or 30m (default: 30d)",
    )
    create.add_argument("--name", default="", help="whom it is for, for `geopetals token list`")
    _add(commands, "list", "print the tokens that have not expired, without what would let anybody use them")
    revoke = _add(commands, "revoke", "end a token, and the membership of all who have joined with it")
    revoke.add_argument("id", metavar="ID", help="as `geopetals token list` prints it; its beginning will do")
    rotate = _add(commands, "rotate", "sign with a new key from now on")
    rotate.add_argument(
        "--retire", action="store_true", help="instead, end the older keys and all that is signed with them alone"
    )


def _add(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--state", type=Path, metavar="DIR", help="the coordinator's state on this machine")
    where.add_argument(
        "--join",
        type=options.join_token,
        metavar="TOKEN",
        help="an admin's token: ask the running coordinator, wherever it is",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(action=name)
    return parser


def run(args: argparse.Namespace) -> int:
    desk = _remote(args.join) if args.join else _LocalTokens(args.state)
    actions = {"create": _create, "list": _list, "revoke": _revoke, "rotate": _rotate}
    actions[args.action](args, desk)
    return 0


class _Desk(Protocol):
    """Answers the methods that coordinators answer to admins. Raises GeoPetalsError."""

    def ask(self, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]: ...


def _remote(token: str) -> _Desk:
    from geopetals.coordinator.remote import SwarmSource
    from geopetals.join_token import JoinToken

    return SwarmSource(JoinToken.decode(token))


class _LocalTokens:
    """The ledger in the coordinator's state, whether it runs or not; a running one sees the change at its next look."""

    def __init__(self, state: Path | None) -> None:
        from geopetals.coordinator.folders import only_state
        from geopetals.credentials.authority import Authority

        self._authority = Authority.existing(state or only_state())

    def ask(self, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        given = body or {}
        match method:
            case "token.create":
                return self._create(**given)
            case "token.list":
                return {"items": [self._entry(entry) for entry in self._authority.tokens()]}
            case "token.revoke":
                return self._entry(self._authority.revoke(given["id"]))
            case _:
                return {"retired": self._authority.retire()} if given["retire"] else {"key": self._authority.rotate()}

    def _create(self, role: str, name: str, life_s: float) -> dict[str, Any]:
        from geopetals.credentials.certificate import Role

        token = self._authority.create_token(Role(role), name=name, life_s=life_s)
        return {"token": token.encode(), "id": token.token_id, "expires_at": token.expires_at}

    def _entry(self, entry: "TokenEntry") -> dict[str, Any]:
        return asdict(entry) | {"usable": self._authority.is_usable(entry)}


def _create(args: argparse.Namespace, desk: _Desk) -> None:
    made = desk.ask("token.create", {"role": args.role, "name": args.name, "life_s": args.expires})
    print(json.dumps(made) if args.json else made["token"])


def _list(args: argparse.Namespace, desk: _Desk) -> None:
    entries = desk.ask("token.list", {})["items"]
    if args.json:
        print(json.dumps({"tokens": entries}))
        return
    for entry in entries:
        print(f"{entry['id']}  {entry['role']:<7} {_state(entry):<26} {entry['name']}".rstrip())


def _state(entry: dict[str, Any]) -> str:
    if entry["revoked_at"] is not None:
        return f"revoked {_day(entry['revoked_at'])}"
    return f"{'until' if entry.get('usable', True) else 'retired, until'} {_day(entry['expires_at'])}"


def _day(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))


def _revoke(args: argparse.Namespace, desk: _Desk) -> None:
    entry = desk.ask("token.revoke", {"id": args.id})
    print(json.dumps(entry) if args.json else f"revoked {entry['id']} ({entry['role']} {entry['name']})".rstrip())


def _rotate(args: argparse.Namespace, desk: _Desk) -> None:
    done = desk.ask("token.rotate", {"retire": args.retire})
    if args.json:
        print(json.dumps(done))
    elif args.retire:
        print(f"{done['retired']} older keys ended: tokens that they signed cannot be used any more")
    else:
        print(f"key {done['key']} signs from now on; end the older ones with --retire once members have new tokens")
