"""Keeps bearer credentials out of logs: whoever reads a join token there could join with it."""

import logging
import re

_TOKEN = re.compile(r"gp2[1-9A-HJ-NP-Za-km-z]{12,}")


def redact(text: str) -> str:
    """The text with all but the beginnings of join tokens taken out."""
    return _TOKEN.sub(lambda match: f"{match[0][:3]}…", text)


class RedactingFormatter(logging.Formatter):
    """A formatter from whose lines, tracebacks included, join tokens are taken out, whoever logs them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
