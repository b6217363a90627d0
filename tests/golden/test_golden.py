import json
from pathlib import Path

import pytest

from tests.golden.runner import differences

CASES = sorted((Path(__file__).parent / "cases").glob("*.json"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_answers_are_those_of_the_published_algorithms(path: Path) -> None:
    assert not differences(json.loads(path.read_text()))


def test_a_wrong_answer_is_found() -> None:
    case = json.loads(next(path for path in CASES if path.stem == "online_contended_001").read_text())
    case["expected"]["cg_bp"]["a"][2] += 1
    case["expected"]["ws_rr"]["wait_ms"][-1] *= 1 + 1e-5
    found = differences(case)
    assert [line.split(":")[0] for line in found] == ["cg_bp.a[2]", "ws_rr.wait_ms[43]"]
