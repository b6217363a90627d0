"""Where a model's description comes from: a built-in card, a `config.json`, or the Hugging Face Hub."""

import difflib
import json
import re
from pathlib import Path
from typing import cast

from geopetals.errors import CheckpointError
from geopetals.models.builtin import NAMES, builtin_card
from geopetals.models.card import ModelCard
from geopetals.models.families import card_from_config

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LARGEST_CONFIG_BYTES = 10_000_000


def find_card(model: str, *, revision: str | None = None) -> ModelCard:
    """The card of a built-in name, of a config.json or the directory that holds it, or of a repository on the Hub.

    The Hub is asked for OWNER/NAME only, when there is no such directory, and for nothing but its config.json.
    Raises CheckpointError.
    """
    if model.lower() in NAMES:
        return builtin_card(model.lower())
    path = _existing(model)
    if path is not None:
        return read_card(path)
    if _REPOSITORY.fullmatch(model):
        from geopetals.models.hub import fetch_config

        return card_from_config(model, _read_json(fetch_config(model, revision)))
    near = difflib.get_close_matches(model.lower(), NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(NAMES)}, or give a path or OWNER/NAME."
    raise CheckpointError(f"there is no model and no file {model[:200]!r}: {hint}")


def _existing(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path if model and path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{model[:200]!r} cannot be read ({error}): check its name and rights.") from error


def read_card(path: Path) -> ModelCard:
    """The card of a config.json, or of the directory that holds it. Raises CheckpointError."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} holds no config.json: give the directory of a model, or its config.json itself.")
    folder = file.absolute().parent
    return card_from_config(folder.name or "model", _read_json(file))


def _read_json(file: Path) -> dict[str, object]:
    try:
        if file.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise CheckpointError(f"{file} is too large for a config.json: give the model's config.json itself.")
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}): check its rights.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON ({error}): give the model's config.json.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is no JSON object: give the model's config.json.")
    return cast(dict[str, object], values)
