"""The model that a coordinator serves: its config and identity, no weights."""

from dataclasses import dataclass
from pathlib import Path

from geopetals.coordinator.core import ModelFacts
from geopetals.models import DTYPES, Dtype, WeightFormat
from geopetals.models.source import read_card
from geopetals.progress import Reporter
from geopetals.swarm.identity import ModelIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """`name` is what members load it by."""

    name: str
    identity: ModelIdentity
    facts: ModelFacts


def open_model(
    model: str, *, revision: str | None, dtype: Dtype | None, weights: WeightFormat | None, reporter: Reporter
) -> ServedModel:
    """`dtype` and `weights` are what most servers will use; None: as the model is stored. Raises CheckpointError."""
    from geopetals.swarm.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model, revision=revision, reporter=reporter)
    card = read_card(checkpoint.directory)
    kind: Dtype = dtype or card.stored_dtype or DTYPES[1]
    facts = ModelFacts(
        name=card.name,
        num_blocks=checkpoint.num_blocks,
        hidden_size=card.hidden_size,
        block_bytes=card.block_bytes(weights or kind, dtype=kind),
        kv_bytes_per_token=card.kv_bytes_per_token(kind),
        hidden_bytes_per_token=card.hidden_bytes_per_token(kind),
        head_groups=card.head_groups,
        max_tokens=card.max_tokens,
    )
    name = str(Path(model).expanduser().absolute()) if Path(model).expanduser().is_dir() else model
    return ServedModel(name=name, identity=checkpoint.identity(), facts=facts)
