"""Calls that wait for what the core decides about them, so that the decision becomes their answer."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Decision = TypeVar("Decision")


class Answer(Generic[Decision]):
    """`latest` is what was decided last while the call waited."""

    def __init__(self) -> None:
        self.latest: Decision | None = None


class Waiting(Generic[Decision]):
    """The calls by what they are about; several about the same get the same answer.

    A call counts as waiting until it goes on, not only until it could: a second decision in the meantime replaces the
    first, and no notification overtakes an answer.
    """

    def __init__(self) -> None:
        self._answers: dict[Hashable, list[Answer[Decision]]] = {}

    @contextmanager
    def wait(self, key: Hashable) -> Iterator[Answer[Decision]]:
        answer: Answer[Decision] = Answer()
        waiting = self._answers.setdefault(key, [])
        waiting.append(answer)
        try:
            yield answer
        finally:
            waiting.remove(answer)
            if not waiting and self._answers.get(key) is waiting:
                del self._answers[key]

    def offer(self, key: Hashable, decision: Decision) -> bool:
        """Whether somebody waits for it."""
        waiting = self._answers.get(key, ())
        for answer in waiting:
            answer.latest = decision
        return bool(waiting)
