import json
import time
from pathlib import Path
from typing import Any

import pytest

from geopetals.cli import main
from geopetals.credentials.certificate import Role
from geopetals.join_token import JoinToken
from tests.issuing import SWARM, Clock, Issuer


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a coordinator has left."""
    monkeypatch.setenv("GEOPETALS_STATE", str(tmp_path / "root"))
    Issuer(tmp_path / "state", clock=Clock(time.time()))
    return tmp_path / "state"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["token", *map(str, arguments)])
    return code, *capsys.readouterr()


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_a_token_is_made_listed_and_revoked(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    code, out, _ = run(capsys, "create", "--role", "server", "--expires", "7d", "--name", "Anna", "--state", state)
    assert code == 0
    token = JoinToken.decode(out)
    assert (token.swarm, token.role) == (SWARM, Role.SERVER)
    (entry,) = answer(capsys, "list", "--state", state)["tokens"]
    assert (entry["id"], entry["name"], entry["usable"]) == (token.token_id, "Anna", True)
    assert entry["expires_at"] - entry["created_at"] == 7 * 86400
    code, out, _ = run(capsys, "list", "--state", state)
    assert out.startswith(f"{token.token_id}  server")
    assert token.credential not in out
    assert answer(capsys, "revoke", token.token_id[:6], "--state", state)["id"] == token.token_id
    assert answer(capsys, "list", "--state", state)["tokens"][0]["revoked_at"] is not None
    assert "revoked" in run(capsys, "list", "--state", state)[1]


def test_keys_are_rotated_and_retired(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    before = answer(capsys, "create", "--role", "client", "--state", state)["id"]
    key = answer(capsys, "rotate", "--state", state)["key"]
    after = answer(capsys, "create", "--role", "client", "--state", state)["id"]
    assert "1 older keys ended" in run(capsys, "rotate", "--retire", "--state", state)[1]
    usable = {entry["id"]: entry["usable"] for entry in answer(capsys, "list", "--state", state)["tokens"]}
    assert usable == {before: False, after: True}
    assert len(bytes.fromhex(key)) == 8
    assert "retired" in run(capsys, "list", "--state", state)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("revoke", "0123"), "not the id of one token"),
        (("create", "--role", "king"), "invalid choice"),
        (("create", "--role", "client", "--expires", "soon"), "is no length of time"),
        (("create", "--role", "client", "--expires", "0d"), "is no length of time"),
        (("create",), "--role"),
        ((), "ACTION"),
    ],
)
def test_mistakes_are_explained(
    capsys: pytest.CaptureFixture[str], state: Path, arguments: tuple[str, ...], words: str
) -> None:
    where = ("--state", state) if arguments else ()
    code, out, err = run(capsys, *arguments, *where)
    assert (code, out) == (2, "")
    assert words in err


def test_a_folder_without_a_coordinator_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "list", "--state", tmp_path / "nothing")
    assert code == 2
    assert "is not a coordinator's state" in err


def test_without_a_word_the_state_of_this_machine_is_meant(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    code, _, err = run(capsys, "list")
    assert code == 2
    assert "no coordinator keeps its state" in err


def test_only_an_admins_token_asks_a_coordinator_elsewhere(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    token = answer(capsys, "create", "--role", "client", "--state", state)["token"]
    code, _, err = run(capsys, "list", "--join", token)
    assert code == 2
    assert "use an admin's" in err
