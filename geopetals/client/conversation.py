"""A chat over one inference session: each turn sends only what the servers have not seen."""

from typing import Any, TextIO

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from geopetals.client.model import DistributedModel
from geopetals.client.session import InferenceSession
from geopetals.client.streaming import Stopwatch, chat_ids

_ROOM = 1024


class _StopFlag(StoppingCriteria):
    raised = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.raised, dtype=torch.bool, device=input_ids.device)


class Conversation:
    """Turns of one person and the model. One thread at a time; `stop()` may be called from a signal handler."""

    def __init__(self, model: DistributedModel, tokenizer: Any, *, system: str | None = None) -> None:
        self._model, self._tokenizer, self._system = model, tokenizer, system
        self._session: InferenceSession | None = None
        self._flag = _StopFlag()
        self.reset()

    def reset(self) -> None:
        """Forget all turns and free the servers' cache."""
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._close_session()

    def stop(self) -> None:
        """End the answer that is being made after its next token."""
        self._flag.raised = True

    def say(self, text: str, *, echo: TextIO | None = None, max_new_tokens: int, **options: Any) -> str:
        """The model's answer, written to `echo` as it comes. On an error the turn is forgotten."""
        self._flag.raised = False
        self._messages.append({"role": "user", "content": text})
        try:
            answer = self._generate(echo, max_new_tokens, options)
        except BaseException:
            self._messages.pop()
            self._close_session()
            raise
        self._messages.append({"role": "assistant", "content": answer})
        return answer

    def _generate(self, echo: TextIO | None, max_new_tokens: int, options: dict[str, Any]) -> str:
        ids = chat_ids(self._tokenizer, self._messages).to(self._model.device)
        session, fresh = self._session_for(ids, max_new_tokens)
        output = self._model.generate(
            fresh,
            session=session,
            max_new_tokens=max_new_tokens,
            streamer=Stopwatch(self._tokenizer, echo=echo),
            stopping_criteria=StoppingCriteriaList([self._flag]),
            **options,
        )
        answer: str = self._tokenizer.decode(output[0, fresh.shape[1] :], skip_special_tokens=True)
        return answer

    def _session_for(self, ids: torch.Tensor, max_new_tokens: int) -> tuple[InferenceSession, torch.Tensor]:
        """The running session and the tokens it lacks; a new one where the template rewrote what went before."""
        session = self._session
        if session is not None and session.output_ids is not None:
            known = session.output_ids.shape[1]
            fits = session.can_grow or ids.shape[1] + max_new_tokens <= session.max_length
            if fits and known < ids.shape[1] and torch.equal(ids[:, :known], session.output_ids.to(ids.device)):
                return session, ids[:, known:]
        self._close_session()
        room = 0 if self._model.swarm.coordination is not None else _ROOM  # others wait for what nobody uses
        self._session = InferenceSession(
            self._model.swarm, ids.shape[1] + max_new_tokens + room, output_tokens=max_new_tokens
        )
        return self._session, ids

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
