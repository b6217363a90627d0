"""When a run does not count, fixed before any run: nobody looks at the figures first.

* All cores were busy for more than 60 % of the time: processes waited for each other, not for devices and links.
* The 99th percentile of how late requests were sent, or of how late the WAN emulator delivered packets, is above 5 % of
  the median ITL: delays were not those stated.
* No request was answered with two tokens or more: there is nothing to compare that with.
* An emulated device or the network is dilated otherwise than the run.

All on the wall clock: a larger time dilation mends the first two.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

MAX_CPU_PERCENT = 60.0
MAX_LATENESS_PERCENT = 5.0


def judge(
    *,
    cpu_percent: float,
    late_p99_s: Mapping[str, float],
    median_itl_s: float | None,
    dilation: float = 1.0,
    dilations: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
    """The verdict, with what it is based on.

    `late_p99_s` by what was late ("arrivals", "packets"); `dilations` of everything that has one of its own.
    """
    reasons = []
    if cpu_percent > MAX_CPU_PERCENT:
        reasons.append(
            f"the machine's cores were busy {cpu_percent:.0f} % of the time, {MAX_CPU_PERCENT:.0f} % allowed"
        )
    if median_itl_s is None:
        reasons.append("no request was answered with two tokens or more")
    for what, late_s in late_p99_s.items():
        if median_itl_s is not None and 100 * late_s > MAX_LATENESS_PERCENT * median_itl_s:
            reasons.append(
                f"{what} were {1000 * late_s:.2f} ms late (p99), {MAX_LATENESS_PERCENT:.0f} % of the median ITL of "
                f"{1000 * median_itl_s:.2f} ms allowed"
            )
    reasons += [
        f"{what} is dilated {other:g} times, the run {dilation:g} times"
        for what, other in dilations.items()
        if other != dilation
    ]
    return {
        "accepted": not reasons,
        "reasons": reasons,
        "cpu_percent": cpu_percent,
        "max_cpu_percent": MAX_CPU_PERCENT,
        "late_p99_ms": {what: 1000 * late_s for what, late_s in late_p99_s.items()},
        "max_late_percent_of_median_itl": MAX_LATENESS_PERCENT,
        "median_itl_wall_ms": None if median_itl_s is None else 1000 * median_itl_s,
    }
