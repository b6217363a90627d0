"""All causal language models of the Transformers that is installed, each tiny; about a minute, without any swarm."""

from collections import Counter
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families import batching_paragraph, read_document, walk

pytestmark = pytest.mark.live
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.timeout(600)
def test_every_family_is_right_or_refused_and_the_document_says_which() -> None:
    verdicts = list(walk(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    assert [verdict for verdict in verdicts if verdict.status == "WRONG"] == []
    assert Counter(verdict.status for verdict in verdicts)["works"] > 80
    version, statuses = read_document(DOCUMENT)
    found = {verdict.family: verdict.status for verdict in verdicts}
    working = {family for family, status in statuses.items() if status == "works"}
    assert not {family for family in working if found.get(family, "works") != "works"}
    batching = [verdict.batching for verdict in verdicts if verdict.status == "works"]
    assert batching.count(None) <= 3
    if version == transformers.__version__:
        assert batching_paragraph(verdicts) in DOCUMENT.read_text(), "the document names other families"
        assert found == statuses, "run: python -m tests.families --write docs/models.md"
