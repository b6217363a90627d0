"""Where a coordinator keeps its state when nobody says."""

import os
from pathlib import Path

from geopetals.errors import UnsupportedInput


def state_root() -> Path:
    """`$GEOPETALS_STATE`, else `$XDG_STATE_HOME/geopetals`, else `~/.local/state/geopetals`; it need not exist yet."""
    chosen = os.environ.get("GEOPETALS_STATE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("XDG_STATE_HOME", ""))  # relative values are to be ignored, says the XDG specification
    return (base if base.is_absolute() else Path.home() / ".local" / "state") / "geopetals"


def state_folder(swarm: str) -> Path:
    return state_root() / swarm


def only_state() -> Path:
    """The state of the one swarm that this machine coordinates. Raises UnsupportedInput if there is not just one."""
    root = state_root()
    found = sorted(path.parent for path in root.glob("*/coordinator.db"))
    if len(found) == 1:
        return found[0]
    what = f"several coordinators keep their state in {root}" if found else f"no coordinator keeps its state in {root}"
    raise UnsupportedInput(f"{what}: say --state, --url or --join.")
