"""Lets scripts in stock PETALS' environment import those modules of GeoPETALS that need the standard library alone.

The environment has no geopetals, and must not see its dependencies. To be called before any other import.
"""

import sys
import types
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def borrow_geopetals() -> None:
    package = types.ModuleType("geopetals")
    package.__path__ = [str(_ROOT / "geopetals")]
    sys.modules["geopetals"] = package
    sys.path.append(str(_ROOT / "tests" / "interop" / "stock"))  # hivemind_names
