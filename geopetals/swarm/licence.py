"""Under which licence a model on the Hub is, as its model card states it."""

import re
from typing import Any

_TAG = "license:"
_NAME = re.compile(r"[A-Za-z0-9][\w.+ -]{0,60}")


def stated_licence(info: Any) -> str | None:
    """From the Hub's description of a repository (`HfApi.model_info`). None if its card states none.

    Names are the Hub's own (`apache-2.0`, `llama3.3`); a licence that has none there (`other`) is called as the card
    calls it. What is no plain name is not shown.
    """
    card = info.card_data or {}
    tags = [str(tag).removeprefix(_TAG) for tag in info.tags or () if str(tag).startswith(_TAG)]
    found = tags[0] if tags else _field(card, "license")
    if found == "other":
        found = _field(card, "license_name") or found
    return found if isinstance(found, str) and _NAME.fullmatch(found) else None


def _field(card: Any, name: str) -> Any:
    """Some cards list several licences: the first one."""
    value = card.get(name)
    return value[0] if isinstance(value, list) and value else value
