"""Numbers as people read them."""


def in_units(count: float) -> str:
    """Bytes: 1 GB = 1e9 bytes."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"
