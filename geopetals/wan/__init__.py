"""A wide-area network on one machine: hosts as network namespaces, one process that delays packets between them."""

from geopetals.wan.errors import WanError, WanFailure
from geopetals.wan.spec import HostSpec, LinkSpec, Nat, WanSpec
from geopetals.wan.wan import Wan

__all__ = ["HostSpec", "LinkSpec", "Nat", "Wan", "WanError", "WanFailure", "WanSpec"]
