"""How a step is put into words: as GeoPETALS' servers read it, or as stock PETALS does."""

import uuid
from collections import deque
from typing import Any, Protocol

import torch
from hivemind.proto import runtime_pb2

from geopetals.swarm.ring_messages import Step
from geopetals.swarm.stack import DUMMY, DUMMY_INT64, pack_args_kwargs
from geopetals.swarm.wire import WireError, serialize, write_metadata

_DUMMY, _DUMMY_INT64 = serialize(DUMMY), serialize(DUMMY_INT64)


class Dialect(Protocol):
    def request(
        self, step: Step, hidden: torch.Tensor, hypo_ids: torch.Tensor | None, prompts: torch.Tensor | None
    ) -> runtime_pb2.ExpertRequest: ...

    def answered(self, metadata: dict[str, Any]) -> Step:
        """Which step an output belongs to. Raises WireError if to none."""
        ...


class RingDialect:
    """Numbered steps; what is not there is not sent."""

    def request(
        self, step: Step, hidden: torch.Tensor, hypo_ids: torch.Tensor | None, prompts: torch.Tensor | None
    ) -> runtime_pb2.ExpertRequest:
        tensors = [serialize(hidden)]
        if hypo_ids is not None or prompts is not None:
            tensors.append(_DUMMY if prompts is None else serialize(prompts))
            tensors.append(_DUMMY_INT64 if hypo_ids is None else serialize(hypo_ids))
        return runtime_pb2.ExpertRequest(tensors=tensors, metadata=step.to_bytes())

    def answered(self, metadata: dict[str, Any]) -> Step:
        return Step.read(metadata)


class PetalsDialect:
    """PETALS' steps. It answers them in order, each with all of its positions."""

    def __init__(self, uid: str, session_id: str) -> None:
        self._uid, self._session_id = uid, session_id
        self._asked: deque[Step] = deque()

    def request(
        self, step: Step, hidden: torch.Tensor, hypo_ids: torch.Tensor | None, prompts: torch.Tensor | None
    ) -> runtime_pb2.ExpertRequest:
        self._asked.append(step)
        return self.words(hidden, hypo_ids, prompts)

    def words(
        self,
        hidden: torch.Tensor,
        hypo_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> runtime_pb2.ExpertRequest:
        """A request with PETALS' metadata, and with more of it."""
        arguments = (hidden, DUMMY if prompts is None else prompts, DUMMY_INT64 if hypo_ids is None else hypo_ids)
        tensors, structure = pack_args_kwargs(*arguments)
        named = {"session_id": self._session_id, "step_id": uuid.uuid4().hex, "args_structure": structure}
        named |= metadata or {}
        return runtime_pb2.ExpertRequest(
            uid=self._uid, tensors=[serialize(tensor) for tensor in tensors], metadata=write_metadata(named)
        )

    def answered(self, metadata: dict[str, Any]) -> Step:
        if not self._asked:
            raise WireError("it answers what was not asked")
        return self._asked.popleft()
