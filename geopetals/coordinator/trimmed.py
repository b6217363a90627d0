"""What members send, cut to what can be of use before it is kept: all of it goes to the disk."""

from collections.abc import Callable
from dataclasses import replace

from geopetals.coordinator.messages import MAX_SESSION_ID, LinkSample, Register, Report, SessionUse

MAX_RESUMED = 256
_MAX_LINKS = 256
_MAX_SESSIONS = 1024
_MAX_NAME, _MAX_ERROR = 100, 500
_MAX_ADDRESSES, _MAX_ADDRESS = 16, 300
_MAX_SAMPLES = 256


def trimmed_links(links: tuple[LinkSample, ...], is_server: Callable[[str], bool]) -> tuple[LinkSample, ...]:
    """Those to servers, one each."""
    found = {link.peer_id: link for link in links if is_server(link.peer_id)}
    return tuple(found.values())[:_MAX_LINKS]


def trimmed_report(report: Report, is_server: Callable[[str], bool]) -> Report:
    """Sessions once each."""
    sessions: dict[str, SessionUse] = {}
    for session in report.sessions:
        if len(session.session_id) <= MAX_SESSION_ID:
            sessions.setdefault(session.session_id, session)
    return replace(
        report,
        error=report.error[:_MAX_ERROR],
        sessions=tuple(sessions.values())[:_MAX_SESSIONS],
        links=trimmed_links(report.links, is_server),
    )


def trimmed_register(register: Register) -> Register:
    profile = register.profile
    return replace(
        register,
        profile=replace(profile, decode=profile.decode[:_MAX_SAMPLES], prefill=profile.prefill[:_MAX_SAMPLES]),
        name=register.name[:_MAX_NAME],
        addresses=tuple(address[:_MAX_ADDRESS] for address in register.addresses[:_MAX_ADDRESSES]),
    )
