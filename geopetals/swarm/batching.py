"""Whether the decode steps of several sessions can be one forward pass of a model, and how: found out, not listed.

Every model is asked when it is loaded, as for everything else here that a family might do in its own way: sessions of
other lengths, with one sequence or more, in a batch and one by one. Where no layout gives what each gives alone, they
are computed one by one.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geopetals.swarm.architecture import MODEL_ERRORS
from geopetals.swarm.batched_attention import NATIVE, DecodeBatch, Layout, batched
from geopetals.swarm.device_memory import is_out_of_memory
from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.self_check import COARSE, EXACT, probe_tokens

if TYPE_CHECKING:
    from geopetals.swarm.stage import Stage

_LAYOUTS: tuple[Layout, ...] = ("rows", "padded")
_STEPS = 2
_ANOTHER_LENGTH = 1_000_003
_LENGTHS = ("max_position_embeddings", "max_seq_len")
_PADDING = 1024  # tokens; windows that only the code of some attention knows of are shorter


class Batching:
    """Decode steps of several sessions in one forward pass of `base`. `layout` is None where that is not exact."""

    def __init__(self, stage: "Stage", base: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._forward = forward
        parameters = inspect.signature(base.forward).parameters.values()
        self._takes_positions = any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in parameters)
        found = {id(config): config for module in base.modules() if (config := getattr(module, "config", None))}
        self._configs = [config for config in found.values() if hasattr(config, "_attn_implementation")]
        self.layout: Layout | None = None
        self.reason = self._find_layout(stage)

    def run(
        self,
        hidden: Tensor,
        start: int,
        end: int,
        sessions: Sequence[SessionKV],
        *,
        layout: Layout,
        **misled: int,
    ) -> Tensor:
        """Hidden states [rows, 1, hidden] of one new token for each sequence of the sessions, in their order.

        The caches get the keys and values; their lengths stay as they were. `misled` as DecodeBatch has it.
        """
        batch = DecodeBatch(sessions, layout, **misled)
        options = {"position_ids": batch.positions} if self._takes_positions else {}
        with batched(batch, self._configs, self._native):
            return self._forward(hidden, start, end, batch.cache, **options)

    def describe(self) -> str:
        """One line for a server's log and status."""
        if self.layout is None:
            return f"decode steps of several sessions are computed one by one: {self.reason}"
        copies = " (keys and values copied side by side)" if self.layout == "padded" else ""
        return f"decode steps of several sessions are computed together{copies}"

    @property
    def _native(self) -> str:
        names = {config._attn_implementation for config in self._configs}
        return str(names.pop()) if len(names) == 1 else "mixed"

    def _find_layout(self, stage: "Stage") -> str:
        """Sets `layout`; says why there is none."""
        if self._native not in NATIVE:
            return f"its attention is {self._native}"
        reason = "sessions are too short"
        for layout in _LAYOUTS:
            sessions = _probe_sessions(stage)
            try:
                error = max(self._error(stage, sessions, layout, seed) for seed in range(_STEPS))
            except MODEL_ERRORS as failure:
                if is_out_of_memory(failure):
                    raise
                reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:160]
                continue
            if error < (EXACT if stage.computes_exactly else COARSE):
                self.layout = layout
                return ""
            reason = f"a batch differs from one session by {error:.1e}"
            if error == float("inf"):
                reason = "what it computes depends on the longest session of a batch"
        return reason

    def _error(self, stage: "Stage", sessions: list[SessionKV], layout: Layout, seed: int) -> float:
        """One more token for all sessions, in a batch and one by one: the largest difference."""
        hidden = _probe(stage, sum(session.batch for session in sessions), 1, seed)
        alone = [
            stage.run(part, stage.start, stage.end, kv=session)
            for part, session in zip(hidden.split([session.batch for session in sessions]), sessions, strict=True)
        ]
        for session in sessions:
            session.length -= 1
        expected = torch.cat(alone)

        def together(**misled: int) -> Tensor:
            return self.run(hidden, stage.start, stage.end, sessions, layout=layout, **misled)

        # What depends on the cache's length, or on that of the keys, would depend on the other sessions in the batch.
        batch = together()
        errors = [_difference(batch, expected, hidden)]
        if layout == "padded":
            padding = _padding(stage, max(session.length for session in sessions))
            errors.append(_difference(together(padding=padding), expected, hidden))
        try:
            # The same computation: equal in every format, and not only as near as rounding allows.
            if _difference(together(claimed_length=_ANOTHER_LENGTH), batch, hidden) > EXACT:
                errors.append(float("inf"))
        except MODEL_ERRORS:
            if layout == "rows":  # side by side, the length may have to be that of the keys
                raise
        for session in sessions:
            session.length += 1
        return max(errors)


def _padding(stage: "Stage", length: int) -> int:
    """Some attention has tables for as many keys as the model was made for."""
    limits = [getattr(stage.config, name, None) for name in _LENGTHS]
    return min([_PADDING, *(max(limit - length - 1, 0) for limit in limits if isinstance(limit, int) and limit > 0)])


def _probe_sessions(stage: "Stage") -> list[SessionKV]:
    longest = probe_tokens(stage) - _STEPS
    sessions = []
    for number, (batch, length) in enumerate([(1, longest), (2, max(longest // 2, 1)), (1, 1)]):
        kv = stage.allocate_kv(stage.start, stage.end, batch=batch, max_length=longest + _STEPS)
        stage.run(_probe(stage, batch, length, number), stage.start, stage.end, kv=kv)
        sessions.append(kv)
    return sessions


def _probe(stage: "Stage", batch: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hidden = 0.1 * torch.randn(batch, tokens, stage.hidden_size, generator=generator)
    return hidden.to(stage.device, stage.dtype)


def _difference(found: Tensor, expected: Tensor, hidden: Tensor) -> float:
    added = (expected.float() - hidden.float()).norm(dim=-1).clamp_min(1e-6)
    errors: Any = (found.float() - expected.float()).norm(dim=-1) / added
    return float(errors.max().nan_to_num(nan=float("inf")))
