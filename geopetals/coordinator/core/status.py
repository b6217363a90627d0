"""What people want to know of a swarm, as plain values."""

from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any

from geopetals.coordinator.core.members import Server
from geopetals.coordinator.core.session import UNKNOWN_S, Session

if TYPE_CHECKING:
    from geopetals.coordinator.core.core import Core

_SHOWN_LINKS = 2000
_HISTORY = 50


def of(core: "Core", now: float) -> dict[str, Any]:
    """Times that begin or end are in seconds from now."""
    desk = core.desk
    admitted = [session for session in desk.sessions.values() if session.admitted]
    on_server = Counter(hop.peer_id for session in admitted for hop in session.hops())
    return {
        "model": core.model.to_dict(),
        "covered": core.placer.covers({p: s.serving for p, s in core.servers.items() if s.serving is not None}),
        "replicas": _replicas(core),
        "servers": [_server(core, server, on_server[server.peer], now) for server in core.servers.values()],
        "clients": len(core.clients),
        "links": _links(core),
        "sessions": [_session(session, now) for session in admitted],
        "queue": [
            {**_session(session, now), "position": position} for position, session in enumerate(desk.waiting.sessions)
        ],
        "counts": dict(desk.notices.counts),
        "demand": {
            "arrivals_per_s": core.demand.rate_per_s(now),
            "prompt_tokens": core.demand.tokens()[0],
            "output_tokens": core.demand.tokens()[1],
        },
        "plan": dict(core.placer.plan),
        "plan_due": None if core.placer.due is None else core.placer.due.reason,
        "history": [entry.to_dict() for entry in core.placer.explained[-_HISTORY:]],
        "finished": desk.finished[-_HISTORY:],
        "accuracy": _accuracy(desk.finished),
    }


def _replicas(core: "Core") -> list[int]:
    replicas = [0] * core.model.num_blocks
    for server in core.servers.values():
        if server.serving is not None:
            for block in range(server.serving.start, server.serving.end):
                replicas[block] += 1
    return replicas


def _server(core: "Core", server: Server, sessions: int, now: float) -> dict[str, Any]:
    target = core.placer.target.get(server.peer)
    books = core.desk.books
    pages = 0 if books is None else books.held[books.row[server.peer]]
    return {
        "peer": server.peer,
        "name": server.register.name,
        "device": server.register.profile.device,
        "dtype": server.register.profile.dtype,
        "quantization": server.register.profile.quantization,
        "relayed": server.register.relayed,
        "state": _state(server),
        "span": None if server.serving is None else list(server.serving),
        "assigned": None if server.assigned is None else list(server.assigned),
        "target": None if target is None else list(target),
        "epoch": server.epoch,
        "away_s": None if server.away_since is None else now - server.away_since,
        "failures": server.failures,
        "cache": None if server.cache is None else server.cache.to_dict(),
        "reserved_block_tokens": pages * core.settings.page_tokens,
        "foreign_block_tokens": server.foreign,
        "sessions": sessions,
        "load_s": server.load_s,
    }


def _state(server: Server) -> str:
    if not server.present:
        return "gone"
    if server.serving is not None:
        return "ready"
    return "moving" if server.moving else "idle" if server.assigned is None else "joining"


def _links(core: "Core") -> dict[str, Any]:
    members = list(core.servers)
    _, errors = core.links.matrix([], members)
    estimated = [float(error) for row in range(len(members)) for error in errors[row, row + 1 :] if error > 0]
    shown = sorted(core.links.in_force.items())[:_SHOWN_LINKS]
    return {
        "measured": [[*pair, rtt_s, core.links.relayed.get(pair, False)] for pair, rtt_s in shown],
        "rates": _rates(core),
        "estimated": len(estimated),
        "estimate_error_s": median(estimated) if estimated else None,
    }


def _rates(core: "Core") -> list[list[Any]]:
    """Sender, receiver, bytes a second in the large messages that came lately."""
    known = core.links.rates.items()
    return [[sender, server, rate] for server, rates in known for sender, rate in rates.items()][:_SHOWN_LINKS]


def _session(session: Session, now: float) -> dict[str, Any]:
    known = session.start_s < UNKNOWN_S
    return {
        "session_id": session.session_id,
        "client": session.client,
        "batch": session.batch,
        "max_length": session.max_length,
        "tokens_used": session.used,
        "chain": [list(hop) for hop in session.chain],
        "asked_s": session.asked_s - now,
        "start_s": session.start_s - now if known else None,
        "end_s": session.end_s - now if known else None,
        "predicted": None if session.predicted is None else session.predicted.to_dict(),
    }


def _accuracy(finished: list[dict[str, Any]]) -> dict[str, Any]:
    """Predicted against measured, of the sessions that ended last: medians of measured / predicted."""
    found: dict[str, list[float]] = {"ttft_s": [], "tpot_s": [], "end_to_end_s": []}
    waits = []
    for each in finished:
        for key, ratios in found.items():
            measured, predicted = each["measured"].get(key), (each["predicted"] or {}).get(key)
            if measured and predicted:
                ratios.append(measured / predicted)
        if each["last_predicted_start_s"] is not None:
            waits.append(abs(each["started_s"] - each["last_predicted_start_s"]))
    return {
        "sessions": len(finished),
        **{key: median(ratios) if ratios else None for key, ratios in found.items()},
        "start_error_s": median(waits) if waits else None,
    }
