"""A coordinator's state folder: for one process at a time, of one swarm and one model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from geopetals.coordinator.store import Store, StoreError
from geopetals.swarm.identity import ModelIdentity


@contextlib.contextmanager
def only_one(state: Path) -> Iterator[None]:
    """The folder, made if it is absent, for this process alone. Raises StoreError."""
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        state.chmod(0o700)
        lock = FileLock(state / "coordinator.lock", timeout=0, mode=0o600)
        lock.acquire()
    except Timeout:
        raise StoreError(f"another coordinator runs with the state in {state}: choose another --state.") from None
    except OSError as error:
        raise StoreError(f"cannot use {state} ({error.strerror}): choose another --state.") from error
    try:
        yield
    finally:
        lock.release()


def check_same_swarm(store: Store, swarm: str, identity: ModelIdentity, state: Path) -> None:
    """Raises StoreError if the state is of another swarm or model."""
    now = {"swarm": swarm, "identity": identity.to_dict()}
    before = store.fact("swarm")
    if before is None:
        store.keep_fact("swarm", now)
    elif before != now:
        raise StoreError(
            f"the state in {state} belongs to swarm {before['swarm']} of model {before['identity']['model']}: "
            "choose another --state, or give the same model and --name."
        )
