"""The core's state as plain values and back. What follows from the rest (routing arrays, ledgers) is made again."""

from typing import TYPE_CHECKING, Any

from geopetals.coordinator.core.books import Books
from geopetals.coordinator.core.members import Client, Server
from geopetals.coordinator.core.profile import server_spec
from geopetals.coordinator.core.session import Session
from geopetals.plan import Chain, Hop, Reservation, Route

if TYPE_CHECKING:
    from geopetals.coordinator.core.core import Core

VERSION = 1


def take(core: "Core") -> dict[str, Any]:
    desk = core.desk
    return {
        "version": VERSION,
        "now": core.now,
        "servers": {peer: server.to_dict() for peer, server in core.servers.items()},
        "clients": {peer: client.to_dict() for peer, client in core.clients.items()},
        "links": core.links.to_dict(),
        "demand": core.demand.to_dict(),
        "placer": core.placer.to_dict(),
        "prices": core.prices.to_dict(),
        "planning": core.planning.to_dict(),
        "outage_s": core.fleet.outage_s,
        "back_s": desk.back_s,
        "order": desk.order.to_dict(),
        "closed": desk.leases.closed,
        "finished": desk.finished,
        "counts": desk.notices.counts,
        "asked": desk.asked,
        "stale": desk.waiting.stale,
        "turn": desk.waiting.turn,
        "sessions": [session.to_dict() for session in desk.sessions.values()],
        "books": None if desk.books is None else _books_to_dict(desk.books, desk.sessions),
    }


def restore(core: "Core", raw: dict[str, Any]) -> None:
    if raw["version"] != VERSION:
        raise ValueError(f"this snapshot has version {raw['version']}, not {VERSION}")
    desk = core.desk
    core.now = raw["now"]
    core.servers.update({peer: Server.from_dict(peer, each) for peer, each in raw["servers"].items()})
    core.clients.update({peer: Client(peer=peer, **each) for peer, each in raw["clients"].items()})
    for peer, server in core.servers.items():
        core.specs[peer] = server_spec(peer, server.register.profile, server.register.limits, core.model)
    core.links.restore(raw["links"])
    core.demand.restore(raw["demand"])
    core.placer.restore(raw["placer"])
    core.prices.restore(raw["prices"])
    core.planning.restore(raw["planning"], core.now)
    core.fleet.outage_s, desk.back_s = raw.get("outage_s", 0.0), raw.get("back_s", 0.0)
    desk.order.restore(raw["order"])
    desk.leases.closed, desk.finished = dict(raw["closed"]), list(raw["finished"])
    desk.notices.counts, desk.asked = dict(raw["counts"]), raw["asked"]
    sessions = [Session.from_dict(each) for each in raw["sessions"]]
    desk.leases.restore(sessions)
    desk.waiting.restore([session for session in sessions if not session.admitted], stale=raw["stale"])
    desk.waiting.turn = raw["turn"]
    if raw["books"] is not None:
        desk.leases.books = _restored_books(core, raw["books"])


def _restored_books(core: "Core", raw: dict[str, Any]) -> Books:
    """As they were, hop for hop and promise for promise."""
    capacities = {peer: core.prices.capacity(server) for peer, server in core.servers.items()}
    books = Books(core.prices.world(), list(core.servers), core.prices.client_rows, capacities)
    for session_id, number, client, hops, slots, wait_s, start_s, end_s, held_from_s, booked_end_s in raw["booked"]:
        chain = Chain(tuple(Hop(*hop) for hop in hops))
        route = Route(
            client=client,
            chain=chain,
            wait_s=wait_s,
            start_s=start_s,
            end_s=end_s,
            cost_s=0.0,
            slots_per_block=slots,
        )
        booked = Reservation(number=number, route=route, held_from_s=held_from_s, end_s=booked_end_s)
        books.state.restore(booked, core.now)
        core.desk.sessions[session_id].bookings.append(number)
    books.state.skip_to(raw["next_number"])
    for session in core.desk.sessions.values():
        if session.admitted and session.bookings:
            books.take(session, session.pages(core.settings.page_tokens))
    return books


def _books_to_dict(books: Books, sessions: dict[str, Session]) -> dict[str, Any]:
    of_number = {number: session.session_id for session in sessions.values() for number in session.bookings}
    return {
        "next_number": books.state.next_number,
        "booked": [
            [
                of_number[number],
                number,
                booked.route.client,
                [[hop.server, hop.start, hop.end] for hop in booked.route.chain],
                booked.route.slots_per_block,
                booked.route.wait_s,
                booked.route.start_s,
                booked.route.end_s,
                booked.held_from_s,
                booked.end_s,
            ]
            for number, booked in books.state.reservations.items()
        ],
    }
