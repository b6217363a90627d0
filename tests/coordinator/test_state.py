"""A state folder has one coordinator, one swarm and one model, and join tokens that are made once."""

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from geopetals.coordinator.state import check_same_swarm, only_one
from geopetals.coordinator.store import Store, StoreError
from geopetals.coordinator.tokens import standing_tokens
from geopetals.credentials.authority import Authority
from geopetals.credentials.ledger import SwarmFacts
from geopetals.join_token import JoinToken
from tests.coordinator.rig import ADDRESS, COORDINATOR, IDENTITY

FACTS = SwarmFacts(
    swarm="swarm", model="tiny", identity=IDENTITY.to_dict(), coordinator_peer_id=COORDINATOR, addresses=(ADDRESS,)
)


def test_a_folder_is_used_by_one_coordinator_at_a_time(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with only_one(state):
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        with pytest.raises(StoreError, match="another coordinator runs"), only_one(state):
            pytest.fail("two coordinators in one folder")
    with only_one(state):
        pass


def test_a_state_is_of_one_swarm_and_one_model(tmp_path: Path) -> None:
    store = Store(tmp_path / "coordinator.db")
    check_same_swarm(store, "swarm", IDENTITY, tmp_path)
    check_same_swarm(store, "swarm", IDENTITY, tmp_path)
    with pytest.raises(StoreError, match="belongs to swarm"):
        check_same_swarm(store, "other", IDENTITY, tmp_path)
    with pytest.raises(StoreError, match="belongs to swarm"):
        check_same_swarm(store, "swarm", replace(IDENTITY, fingerprint="2" * 64), tmp_path)
    store.close()


def test_tokens_are_made_once_and_anew_when_they_would_not_lead_here(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.describe_swarm(FACTS)
    first = standing_tokens(authority, tmp_path)
    assert {role: str(JoinToken.decode(text).role) for role, text in first.items()} == {
        "server": "server",
        "client": "client",
        "admin": "admin",
    }
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in tmp_path.glob("*.token"))
    assert standing_tokens(Authority(tmp_path), tmp_path) == first
    authority.revoke(JoinToken.decode(first["client"]).token_id)
    second = standing_tokens(authority, tmp_path)
    assert second["server"] == first["server"]
    assert second["client"] != first["client"]
    authority.describe_swarm(replace(FACTS, addresses=(ADDRESS.replace("/tcp/1/", "/tcp/2/"),)))
    third = standing_tokens(authority, tmp_path)
    assert not set(third.values()) & set(second.values())
