import json

import pytest

from geopetals.errors import SwarmMismatch
from geopetals.swarm.identity import ModelIdentity

HASH, OTHER = "a" * 64, "b" * 64


def identity(
    *, model: str = "tiny", config_hash: str = HASH, revision: str | None = None, fingerprint: str | None = None
) -> ModelIdentity:
    return ModelIdentity(model=model, config_hash=config_hash, revision=revision, fingerprint=fingerprint)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (identity(), identity()),
        (identity(fingerprint=HASH), identity(model="copy", fingerprint=HASH)),
        (identity(revision="1" * 40, fingerprint=HASH), identity(revision="2" * 40, fingerprint=HASH)),
        (identity(revision="1" * 40), identity(model="mirror", revision="1" * 40)),
        (identity(revision="1" * 40), identity(fingerprint=HASH)),
    ],
)
def test_equal_as_far_as_both_know(ours: ModelIdentity, theirs: ModelIdentity) -> None:
    assert ours.conflict(theirs) is None
    assert theirs.conflict(ours) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [
        (identity(), identity(config_hash=OTHER), "configurations differ"),
        (identity(fingerprint=HASH), identity(fingerprint=OTHER), "weights"),
        (identity(revision="1" * 40), identity(revision="2" * 40), "revision"),
    ],
)
def test_conflict_names_what_differs(ours: ModelIdentity, theirs: ModelIdentity, word: str) -> None:
    sentence = ours.conflict(theirs)
    assert sentence is not None
    assert word in sentence


def test_survives_json() -> None:
    ours = identity(revision="1" * 40, fingerprint=HASH)
    assert ModelIdentity.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


@pytest.mark.parametrize(
    "change",
    [
        {"config_hash": "x" * 64},
        {"config_hash": None},
        {"fingerprint": HASH + "a"},
        {"fingerprint": 7},
        {"revision": "../../etc"},
        {"model": ""},
        {"model": "a\nb"},
        {"model": "m" * 1000},
        {"model": ["tiny"]},
        {"extra": 1},
    ],
)
def test_refuses_what_it_could_not_have_sent(change: dict[str, object]) -> None:
    with pytest.raises(SwarmMismatch):
        ModelIdentity.from_dict(identity().to_dict() | change)


@pytest.mark.parametrize("data", [None, [], "identity", {}, {"model": "tiny"}])
def test_refuses_other_data(data: object) -> None:
    with pytest.raises(SwarmMismatch):
        ModelIdentity.from_dict(data)
