"""Models as the planner needs them: parameters, memory per block, attention cache; without torch."""

from geopetals.models.builtin import NAMES, builtin_card
from geopetals.models.card import DTYPE_BYTES, DTYPES, WEIGHT_FORMATS, Dtype, ModelCard, WeightFormat
from geopetals.models.families import FAMILIES, card_from_config
from geopetals.models.source import find_card, read_card

__all__ = [
    "DTYPES",
    "DTYPE_BYTES",
    "FAMILIES",
    "NAMES",
    "WEIGHT_FORMATS",
    "Dtype",
    "ModelCard",
    "WeightFormat",
    "builtin_card",
    "card_from_config",
    "find_card",
    "read_card",
]
