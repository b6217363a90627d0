"""Checkpoints that this stack and stock PETALS' (transformers 4.34) read alike.

transformers 5 saves `rope_parameters` and `dtype`. 4.34 knows neither: it takes a rope_theta of 10000 whatever the
model has, and stock PETALS answers with plausible wrong tokens.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geopetals.errors import CheckpointError

_SCALINGS = ("linear", "dynamic")  # that 4.34 computes, with a "factor" alone


def legacy_copy(model: Path, target: Path) -> Path:
    """A directory whose config has the older keys in place of the newer; all other files are links to the model's.

    Raises CheckpointError for rotary embeddings that transformers 4.34 cannot compute.
    """
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} has no config.json that can be read: give a model's directory.") from error
    target.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name != "config.json" and not (target / file.name).exists():
            (target / file.name).symlink_to(file.resolve())
    (target / "config.json").write_text(json.dumps(legacy_config(config), indent=2) + "\n")
    return target


def legacy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model under the keys of transformers 4.34, which 5 reads too."""
    legacy = {"torch_dtype" if key == "dtype" else key: value for key, value in config.items()}
    rope = legacy.pop("rope_parameters", None)
    if rope is None:
        return legacy
    kind = rope.get("rope_type", "default")
    if "rope_theta" not in rope or kind not in ("default", *_SCALINGS):
        raise CheckpointError(
            f"stock PETALS cannot compute the rotary embeddings of this model ({kind}): compare another model."
        )
    scaling = None if kind == "default" else {"type": kind, "factor": rope["factor"]}
    return {**legacy, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
