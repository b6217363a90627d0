"""Spans of blocks as people read them."""

from collections.abc import Sequence


def span_text(span: Sequence[int] | None) -> str:
    """`start:end` of a half-open span; a dash for none."""
    return f"{span[0]}:{span[1]}" if span else "-"
