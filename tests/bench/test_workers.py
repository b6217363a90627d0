"""Client processes of the load generator."""

from typing import Any

import pytest

from geopetals.bench.worker_loop import boot_id
from geopetals.bench.workers import Workers
from geopetals.errors import UnsupportedInput


def test_a_client_under_another_clock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(self: Workers, kind: str, timeout_s: float) -> dict[str, dict[str, Any]]:
        return {"paris": {"facts": {}, "boot": boot_id()}, "tokyo": {"facts": {}, "boot": "another"}}

    monkeypatch.setattr(Workers, "gather", gather)
    with pytest.raises(UnsupportedInput, match="the client of tokyo runs on another machine"):
        Workers.__new__(Workers).ready()
