"""One golden case, of whichever family."""

from typing import Any

from geopetals.errors import GeoPetalsError
from tests.golden import offline, online, units
from tests.golden.inputs import Inputs


def differences(case: dict[str, Any]) -> list[str]:
    """What differs from the expected answers, a line each; empty if the case passes."""
    if "retry_wait" in case:
        return list(units.check(case))
    inputs, expected, comparable = Inputs.of(case["inputs"]), case["expected"], case["comparable"]
    try:
        if case["family"] == "gsa":
            return list(offline.check_gsa(inputs, expected, comparable))
        if "interarrival_ms" in case["inputs"]:
            return list(online.check(inputs, expected, comparable))
        return list(offline.check(inputs, expected, comparable))
    except GeoPetalsError as error:
        return [f"{type(error).__name__}: {error}"]
