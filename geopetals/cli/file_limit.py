"""How many files, and so connections, a process may have open."""

import contextlib
import resource

_ENOUGH = 65536


def raise_file_limit() -> None:
    """The usual soft limit of 1,024 is less than the idle connections that one stranger can hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
