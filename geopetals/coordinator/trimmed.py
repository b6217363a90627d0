"""What members send, cut to what can be of use before it is kept: all of it goes to the disk."""

from collections.abc import Callable
from dataclasses import replace

from geopetals.coordinator.messages import (
    MAX_PEER_ID,
    MAX_SESSION_ID,
    LinkSample,
    Register,
    Report,
    SessionUse,
    check_shown,
)

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
        if len(session.session_id) <= MAX_SESSION_ID and session.session_id.isprintable():
            sessions.setdefault(session.session_id, session)
    return replace(
        report,
        error=_in_one_line(report.error[:_MAX_ERROR]),
        sessions=tuple(sessions.values())[:_MAX_SESSIONS],
        links=trimmed_links(report.links, is_server),
        rates=tuple({rate.peer_id: rate for rate in report.rates if _is_peer(rate.peer_id)}.values())[:_MAX_LINKS],
    )


def trimmed_register(register: Register) -> Register:
    """Raises MessageError for what must not be shown to people: here, since older logs may hold anything."""
    profile = register.profile
    named = {"name": register.name[:_MAX_NAME], "device": profile.device, "dtype": profile.dtype}
    for what, text in {**named, "quantization": profile.quantization or ""}.items():
        check_shown(text, f"a server's {what}", _MAX_NAME)
    return replace(
        register,
        profile=replace(profile, decode=profile.decode[:_MAX_SAMPLES], prefill=profile.prefill[:_MAX_SAMPLES]),
        name=register.name[:_MAX_NAME],
        addresses=tuple(filter(_is_address, register.addresses[:_MAX_ADDRESSES])),
    )


def _is_peer(text: str) -> bool:
    return len(text) <= MAX_PEER_ID and text.isascii() and text.isalnum()


def _is_address(text: str) -> bool:
    return len(text) <= _MAX_ADDRESS and text.isascii() and text.isprintable()


def _in_one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
