import io
import logging
import sys
from pathlib import Path

from geopetals.credentials.redaction import RedactingFormatter, redact
from tests.issuing import Issuer


def test_tokens_are_taken_out_and_all_else_stays(tmp_path: Path) -> None:
    pasted = Issuer(tmp_path).token().credential
    assert redact(f"--join {pasted} --port 1") == "--join gp2… --port 1"
    for text in ("gp2 is the prefix", "gp1abc" * 20, "ordinary words"):
        assert redact(text) == text


def test_no_line_of_a_log_has_a_token_however_it_came_there(tmp_path: Path) -> None:
    pasted, stream = Issuer(tmp_path).token().credential, io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactingFormatter("%(message)s"))
    log = logging.Logger("test", logging.DEBUG)
    log.addHandler(handler)
    log.debug("joining with %s", pasted)
    log.info("argv=%r", ["serve", "--join", pasted])
    try:
        raise ValueError(pasted)
    except ValueError:
        log.warning("failed", exc_info=sys.exc_info())
    assert "joining with gp2…" in stream.getvalue()
    assert pasted not in stream.getvalue()
    assert pasted[10:40] not in stream.getvalue()
