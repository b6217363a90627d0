"""The coordinator's decisions: a pure state machine from events to actions, without clock, I/O or randomness.

The same events give the same actions, live, after a restart, and when a recorded log is replayed.
"""

from geopetals.coordinator.core.core import Core
from geopetals.coordinator.core.settings import ModelFacts, Settings

__all__ = ["Core", "ModelFacts", "Settings"]
