"""What a coordinator has recorded, decided once more: by the same core, in simulated time."""

from collections.abc import Iterator

from geopetals.coordinator.core import Core, ModelFacts, Settings
from geopetals.coordinator.core.replay import Recorded, Replayed, replay
from geopetals.coordinator.store import Store, StoreError

_FACT = "core"


def note_core(store: Store, model: ModelFacts, settings: Settings) -> None:
    """With what the events to come are decided."""
    store.keep_fact(_FACT, {"model": model.to_dict(), "settings": settings.to_dict()})


def replay_store(store: Store) -> Replayed:
    """From the first event on, or the oldest snapshot if the first ones are gone. Raises StoreError.

    Decisions differ after a change of the settings, or of the release.
    """
    fact = store.fact(_FACT)
    if fact is None:
        raise StoreError("nothing is recorded in this state yet: run the coordinator first.")
    core = Core(ModelFacts.from_dict(fact["model"]), Settings.from_dict(fact["settings"]))
    first, after = next(iter(store.events()), None), 0
    if first is not None and first.number > 1:
        snapshot = store.oldest_snapshot()
        if snapshot is None:
            raise StoreError("the first events are gone, and there is no snapshot: nothing can be replayed.")
        core.restore(snapshot.body)
        after = snapshot.number
    return replay(core, _log(store, after))


def _log(store: Store, after: int) -> Iterator[Recorded]:
    for logged in store.events(after=after):
        yield Recorded(at_s=logged.at, event=logged.body, actions=logged.actions)
