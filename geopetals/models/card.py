"""What a model needs from a server: parameters and bytes of one block, attention cache, hidden states on the wire.

Counts are exact for the families in `families.py`; tests compare them with the tensors that Transformers and
bitsandbytes make. Where blocks look back at a window only, the cache of the whole session is counted: an upper bound.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

WeightFormat = Literal["float32", "bfloat16", "float16", "int8", "nf4"]
Dtype = Literal["float32", "bfloat16", "float16"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

_NF4_GROUP = 64  # weights that share one float32 scale
_NF4_CODEBOOK_BYTES = 16 * 4
_INT8_SCALE_BYTES = 4  # one float32 scale per output


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One architecture at one size. All blocks are alike."""

    name: str
    family: str
    num_blocks: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    linear: tuple[tuple[int, int], ...]
    """(outputs, inputs) of each linear layer of a block: what int8 and nf4 make smaller."""
    other_parameters: int
    """Of one block: norms, biases, and the experts and routers of mixtures, which bitsandbytes leaves as they are."""
    active_parameters: int
    """Of one block, those that one token is multiplied with: all but the experts that are not chosen."""
    outside_parameters: int
    """Embeddings, final norm and LM head, which the client holds; shared matrices once."""
    stored_dtype: Dtype | None = None
    max_tokens: int | None = None

    @property
    def linear_parameters(self) -> int:
        """Of one block."""
        return sum(rows * columns for rows, columns in self.linear)

    @property
    def block_parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    @property
    def total_parameters(self) -> int:
        return self.num_blocks * self.block_parameters + self.outside_parameters

    @property
    def head_groups(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads

    def block_bytes(self, weights: WeightFormat, *, dtype: Dtype = "bfloat16") -> int:
        """Memory of one block's weights; `dtype` is that of what int8 and nf4 leave as it is.

        int8 (LLM.int8()): one byte per weight and a scale per output. nf4: half a byte per weight, a scale per 64
        weights and the code book of 16 values for each linear layer, 4.5 bits per weight in all.
        """
        if weights in DTYPE_BYTES:
            return self.block_parameters * DTYPE_BYTES[weights]
        rest = self.other_parameters * DTYPE_BYTES[dtype]
        if weights == "int8":
            return rest + sum(rows * (columns + _INT8_SCALE_BYTES) for rows, columns in self.linear)
        return rest + sum(_nf4_bytes(rows * columns) for rows, columns in self.linear)

    def active_bytes(self, weights: WeightFormat, *, dtype: Dtype = "bfloat16") -> int:
        """The part of `block_bytes` that is read for one token: experts that are not chosen stay unread."""
        inactive = self.block_parameters - self.active_parameters
        each = DTYPE_BYTES[weights] if weights in DTYPE_BYTES else DTYPE_BYTES[dtype]
        return self.block_bytes(weights, dtype=dtype) - inactive * each

    def kv_bytes_per_token(self, dtype: Dtype = "bfloat16") -> int:
        """Keys and values of one token in one block."""
        return 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    def hidden_bytes_per_token(self, dtype: Dtype = "bfloat16") -> int:
        """One hidden state on the wire, without the few bytes of its envelope."""
        return self.hidden_size * DTYPE_BYTES[dtype]

    def blocks_that_fit(self, memory_bytes: float, weights: WeightFormat, *, kv_tokens: int = 0) -> int:
        """Blocks in `memory_bytes`, each with attention cache for `kv_tokens` tokens; at most all of the model."""
        each = self.block_bytes(weights) + kv_tokens * self.kv_bytes_per_token()
        return min(math.floor(memory_bytes / each), self.num_blocks)


def _nf4_bytes(weights: int) -> int:
    return math.ceil(weights / 2) + 4 * math.ceil(weights / _NF4_GROUP) + _NF4_CODEBOOK_BYTES
