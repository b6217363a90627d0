"""What clients are told of their sessions."""

from collections.abc import Callable

from geopetals.coordinator.core.actions import Action, Admitted, Queued, Refused, SessionEnded
from geopetals.coordinator.core.session import UNKNOWN_S, Session

GUESSED_WAIT_S = 10.0
"""For what nobody knows how long it takes."""
_TOLD_S, _TOLD = 0.5, 0.2
"""A prediction is told again if it has changed by more than either."""


def is_off(start_s: float, before_s: float, now: float) -> bool:
    """Whether a predicted instant has changed noticeably."""
    return abs(start_s - before_s) > max(_TOLD_S, _TOLD * max(before_s - now, 0.0))


class Notices:
    """Appends to `out`. expected_cover_s: when all blocks will be served, if they are not; None: nobody is at it."""

    def __init__(self, expected_cover_s: Callable[[float], float | None], longest_s: float, out: list[Action]) -> None:
        self.expected_cover_s, self._longest_s, self._out = expected_cover_s, longest_s, out
        self.counts = {"admitted": 0, "refused": 0, "closed": 0, "ended": 0}

    def admitted(self, session: Session) -> None:
        assert session.predicted is not None, "an admitted session has a prediction"
        self._out.append(
            Admitted(
                session_id=session.session_id,
                client=session.client,
                chain=session.chain,
                predicted=session.predicted,
                batch=session.batch,
                max_tokens=session.max_length,
            )
        )

    def queued(self, session: Session, position: int, now: float) -> None:
        start_s = session.told_start_s = session.start_s
        if start_s >= UNKNOWN_S:
            start_s = now + self.cover_in_s(now)
        elif session.first_start_s is None:
            session.first_start_s = start_s
        in_s = max(start_s - now, 0.0)
        self._out.append(
            Queued(session_id=session.session_id, client=session.client, position=position, start_in_s=in_s)
        )

    def changed(self, session: Session, position: int, now: float) -> None:
        """Tell a session that waits if its prediction has changed noticeably."""
        if session.told_start_s is None or is_off(session.start_s, session.told_start_s, now):
            self.queued(session, position, now)

    def refused(self, session: Session, why: str, retry_after_s: float, *, is_incomplete: bool = False) -> None:
        """It never had cache."""
        self.counts["refused"] += 1
        self.denied(session.session_id, session.client, why, retry_after_s, is_incomplete=is_incomplete)

    def denied(
        self, session_id: str, client: str, why: str, retry_after_s: float = 0.0, *, is_incomplete: bool = False
    ) -> None:
        """A wish is not fulfilled."""
        self._out.append(
            Refused(
                session_id=session_id,
                client=client,
                why=why,
                retry_after_s=min(retry_after_s, self._longest_s),
                is_incomplete=is_incomplete,
            )
        )

    def ended(self, session: Session, why: str) -> None:
        self.counts["ended"] += 1
        self._out.append(SessionEnded(session_id=session.session_id, client=session.client, why=why))

    def cover_in_s(self, now: float) -> float:
        """How long until all blocks are served, or a guess."""
        cover_s = self.expected_cover_s(now)
        return GUESSED_WAIT_S if cover_s is None or cover_s <= now else max(cover_s - now, 1.0)
