"""The paper's accounting: a session that finds no free cache tries again at PETALS' instants, and waits as booked."""

import math

from geopetals.routing.state import Accounting

_RETRIES_S = (1.0, 3.0, 7.0, 15.0, 31.0, 63.0)
_AFTERWARDS_S = 60.0
_TOLERANCE = 1e-9


def retry_wait_s(wait_s: float) -> float:
    """The first retry, 1, 3, 7, 15, 31, 63, 123, 183, .. s after arrival, at or after the end of the wait."""
    if wait_s <= 0:
        return 0.0
    needed_s = wait_s * (1 - _TOLERANCE)
    for retry_s in _RETRIES_S:
        if retry_s >= needed_s:
            return retry_s
    return _RETRIES_S[-1] + _AFTERWARDS_S * math.ceil((needed_s - _RETRIES_S[-1]) / _AFTERWARDS_S)


def paper_accounting(constant_s: float = 0.0) -> Accounting:
    """Starts at retries, caches taken from arrival to completion, and a constant for every request.

    The constant is the initial delay and the paper's allocation delay (250 s for PETALS, 60 s for the proposed method),
    which make up 60-100 % of the published gap: report results with them and without.
    """
    return Accounting(start_after=retry_wait_s, booked_from_arrival=True, constant_s=constant_s)
