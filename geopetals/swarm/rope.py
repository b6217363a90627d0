"""Rotary embeddings that change with the length of the sequence.

`longrope` takes other frequencies for all tokens of a text longer than the model was first trained on, and `dynamic`
frequencies for each length. Keys in the cache cannot be turned afterwards, and Transformers keeps the frequencies of
`dynamic` in the model, where sessions would share them. So what depends on the length is refused.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from geopetals.errors import UnsupportedInput


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeLimit:
    """Up to `tokens` the frequencies do not change. `fixed_beyond`: they change once, and not again."""

    tokens: int
    fixed_beyond: bool

    def check(self, past: int, new: int) -> None:
        """Raises UnsupportedInput if `new` tokens after `past` ones need frequencies that the past did not have."""
        if past + new <= self.tokens or (self.fixed_beyond and (past == 0 or past > self.tokens)):
            return
        how = "send more tokens than that at once as the first step of a session" if self.fixed_beyond else "stay below"
        raise UnsupportedInput(
            f"beyond {self.tokens} tokens this model turns all tokens by other angles, the cached ones too; {how}."
        )


def find_rope_limit(model: nn.Module, config: PretrainedConfig) -> RopeLimit | None:
    """The tightest limit of the rotary embeddings in `model`, or None if none changes with the length."""
    limits = [_limit(module, kind, config) for module in model.modules() for kind in _kinds(module)]
    return min((limit for limit in limits if limit is not None), key=lambda limit: limit.tokens, default=None)


def _kinds(module: nn.Module) -> list[str]:
    kind = getattr(module, "rope_type", None)
    return [kind] if isinstance(kind, str) else [str(item) for item in kind.values()] if isinstance(kind, dict) else []


def _limit(module: nn.Module, kind: str, config: PretrainedConfig) -> RopeLimit | None:
    if "dynamic" in kind:
        return RopeLimit(tokens=int(getattr(module, "original_max_seq_len", 0) or 0), fixed_beyond=False)
    if kind == "longrope":
        return RopeLimit(tokens=_original_length(config.rope_parameters), fixed_beyond=True)
    return None


def _original_length(parameters: dict[str, object]) -> int:
    """`rope_parameters` are those of the model, or one set for each kind of layer."""
    found = parameters.get("original_max_position_embeddings")
    if isinstance(found, int | float):
        return int(found)
    return min((_original_length(item) for item in parameters.values() if isinstance(item, dict)), default=0)
