"""Where files that can be made again are kept."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$GEOPETALS_CACHE`, else `$XDG_CACHE_HOME/geopetals`, else `~/.cache/geopetals`; it need not exist yet."""
    chosen = os.environ.get("GEOPETALS_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # relative values are to be ignored, says the XDG specification
    return (base if base.is_absolute() else Path.home() / ".cache") / "geopetals"
