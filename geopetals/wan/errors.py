"""What can go wrong with an emulated network."""

from geopetals.errors import GeoPetalsError


class WanError(GeoPetalsError):
    """The network asked for is malformed, or this machine does not allow one; the sentence says what to change."""


class WanFailure(GeoPetalsError):
    """A network that ran does not run any more, or does not answer."""

    exit_code = 1
