"""The model that a cluster serves, in the format in which it is served."""

from dataclasses import dataclass
from typing import Annotated, Any, Self

from geopetals.cluster.errors import ClusterError, at
from geopetals.cluster.kinds import Amount, Choice, Files, Name, Schema, Whole, mapping
from geopetals.cluster.quantities import MEMORY
from geopetals.cluster.records import Entry, Record
from geopetals.models import DTYPES, NAMES, WEIGHT_FORMATS, Dtype, ModelCard, WeightFormat

_BYTES = Amount(MEMORY, positive=True, most=1e15)
_WEIGHTS, _DTYPE = Choice(*WEIGHT_FORMATS), Choice(*DTYPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(Record):
    """Numbers only, so that a cluster is complete without the files of its model.

    In a cluster file also `model: NAME`, or `{card: NAME | config: PATH, weights: nf4, dtype: bfloat16}`.
    """

    WHAT = "model"

    name: Annotated[str, Entry("name", Name(), "what the model is called")]
    num_blocks: Annotated[int, Entry("blocks", Whole(most=100_000), "number of blocks (decoder layers)")]
    hidden_size: Annotated[int, Entry("hidden_size", Whole(), "values of one hidden state")]
    block_bytes: Annotated[int, Entry("block_memory", _BYTES, "memory of one block's weights")]
    kv_bytes_per_token: Annotated[int, Entry("kv_per_token", _BYTES, "attention cache of one token in one block")]
    hidden_bytes_per_token: Annotated[int, Entry("hidden_state", _BYTES, "one token's hidden state on the wire")]
    active_parameters: Annotated[
        int | None, Entry("active_parameters", Whole(), "parameters of one block that a token is multiplied with")
    ] = None
    active_bytes: Annotated[
        int | None, Entry("active_memory", _BYTES, "the part of block_memory that one token reads; none: all of it")
    ] = None
    head_groups: Annotated[int, Entry("head_groups", Whole(), "query heads per key-value head")] = 1
    max_tokens: Annotated[int | None, Entry("max_tokens", Whole(), "longest session that the model allows")] = None

    @classmethod
    def of(cls, card: ModelCard, *, weights: WeightFormat | None = None, dtype: Dtype = "bfloat16") -> Self:
        """A model from its card. `dtype`: of cache and hidden states, and of weights unless they are quantized."""
        block_bytes = card.block_bytes(weights or dtype, dtype=dtype)
        return cls(
            name=card.name.rpartition("/")[2],
            num_blocks=card.num_blocks,
            hidden_size=card.hidden_size,
            block_bytes=block_bytes,
            kv_bytes_per_token=card.kv_bytes_per_token(dtype),
            hidden_bytes_per_token=card.hidden_bytes_per_token(dtype),
            active_parameters=card.active_parameters,
            active_bytes=card.active_bytes(weights or dtype, dtype=dtype),
            head_groups=card.head_groups,
            max_tokens=card.max_tokens,
        )

    @classmethod
    def from_value(cls, value: object, files: Files) -> Self:
        if isinstance(value, str):
            return cls.of(files.card(value))
        given = mapping(value, cls.WHAT)
        sources = [key for key in ("card", "config") if key in given]
        if not sources:
            return super(ModelSpec, cls).from_value(value, files)
        for key in given:
            if key not in (*sources, "weights", "dtype"):
                raise ClusterError((key,), f"does not go together with {sources[0]!r}: leave it out.")
        if len(sources) > 1:
            raise ClusterError(("config",), "is given beside 'card': keep one of them.")
        with at(sources[0]):
            text = Name().read(given[sources[0]], files)
        dtype: Any = given.get("dtype") or "bfloat16"
        with at("dtype"):
            _DTYPE.check(dtype)
        weights: Any = given.get("weights") or dtype
        with at("weights"):
            _WEIGHTS.check(weights)
        card = files.card(text if sources == ["card"] else files.absolute(text))
        return cls.of(card, weights=weights, dtype=dtype)

    @classmethod
    def schema(cls) -> Schema:
        formats: Schema = {"weights": _WEIGHTS.schema(), "dtype": _DTYPE.schema()}
        return {
            "oneOf": [
                {"type": "string", "description": "a built-in model, OWNER/NAME on the Hub", "examples": list(NAMES)},
                _closed({"card": {"type": "string", "examples": list(NAMES)}} | formats, "card"),
                _closed(
                    {"config": {"type": "string", "description": "a config.json, or its directory"}} | formats, "config"
                ),
                super(ModelSpec, cls).schema(),
            ]
        }


def _closed(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}
