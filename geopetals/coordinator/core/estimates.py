"""How long sessions take: by the timing model, corrected by what sessions like them took."""

from dataclasses import replace
from typing import Any

from geopetals.coordinator.core.books import Books
from geopetals.coordinator.core.demand import Demand
from geopetals.coordinator.core.session import Session
from geopetals.coordinator.messages import Measured, Predicted
from geopetals.plan import Route

_LEAST_S = 1e-6
_BELIEF_TOKENS = 8


def choose(books: Books, demand: Demand, session: Session, pages: int, now: float) -> Route:
    """Its route if it came now. Raises NoChain or ServerFull.

    The router prices the workload's session: this one has its own length, and is slowed down alike.
    """
    row = books.client_row(session.client)
    route = books.state.route(row, now, slots_per_block=pages)
    usual_s = books.state.costs.chain_s(row, route.chain)
    slower = (route.end_s - route.start_s) / usual_s if usual_s else 1.0
    session.first_s = books.times.first_s(row, route.chain, session.prompt) * slower
    session.step_s = books.times.step_s(row, route.chain) * slower
    tokens = max(round(session.output * demand.length(session.client)), 1)
    speed = demand.speed(session.client)
    session.service_s = max((session.first_s + (tokens - 1) * session.step_s) * speed, _LEAST_S)
    return replace(route, end_s=route.start_s + session.service_s)


def predict(demand: Demand, session: Session, now: float) -> Predicted:
    """Of a session that starts now."""
    wait_s, speed = now - session.asked_s, demand.speed(session.client)
    first_s, step_s = session.first_s * speed, session.step_s * speed
    return Predicted(
        ttft_s=wait_s + first_s,
        tpot_s=step_s,
        end_to_end_s=wait_s + first_s + (session.output - 1) * step_s,
        wait_s=wait_s,
    )


def left_s(session: Session, now: float) -> float:
    """How much longer an admitted session goes on, by the tokens that its servers have seen.

    Its pace is that between two reports, not that since its start, which holds the first token: of a session that has
    made two tokens that says twice too much. What was predicted counts as much as some tokens that were seen.
    """
    done = session.used - session.prompt
    if done < 1 or now <= session.start_s:
        return max(session.start_s + session.service_s - now, 0.0)
    left = max(session.prompt + session.output - 1 - session.used, 0)  # the last token is not sent back
    seen, took_s = session.used - session.first_used, session.progress_s - session.first_progress_s
    if session.service_s > 0:
        seen, took_s = seen + _BELIEF_TOKENS, took_s + _BELIEF_TOKENS * session.service_s / session.output
    elif seen < 1:  # it was resumed, and nothing is known of it but how far it is
        seen, took_s = done, session.progress_s - session.start_s
    return left * took_s / seen


def learn(demand: Demand, session: Session, measured: Measured, now: float) -> dict[str, Any]:
    """From a session that is over. How long it took is what the coordinator saw. Gives what is kept of it."""
    tokens = min(measured.tokens, session.max_length)
    if tokens and session.step_s > 0 and not measured.failovers:
        demand.ended(
            session.client,
            predicted_s=session.first_s + (tokens - 1) * session.step_s,
            took_s=now - session.start_s,
            expected_tokens=session.output,
            tokens=tokens,
        )
    return {
        "session_id": session.session_id,
        "client": session.client,
        "asked_s": session.asked_s,
        "started_s": session.start_s,
        "ended_s": now,
        "first_predicted_start_s": session.first_start_s,
        "last_predicted_start_s": session.told_start_s,
        "predicted": None if session.predicted is None else session.predicted.to_dict(),
        "measured": measured.to_dict(),
    }
