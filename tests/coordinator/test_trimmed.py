"""What goes to the disk of what members send."""

from dataclasses import replace

import pytest

from geopetals.coordinator import messages as m
from geopetals.coordinator.trimmed import trimmed_links, trimmed_register, trimmed_report
from tests.coordinator.rig import register


def test_links_to_servers_are_kept_and_no_more_than_a_swarm_needs() -> None:
    links = tuple(m.LinkSample(f"p{number}", 0.1, False) for number in range(4000))
    assert trimmed_links(links, lambda peer: peer in ("p7", "p9")) == (links[7], links[9])
    assert len(trimmed_links(links, lambda peer: True)) == 256
    assert trimmed_links((links[0],) * 4000, lambda peer: True) == (links[0],)


def test_a_report_names_each_session_once() -> None:
    sessions = (
        *(m.SessionUse("same", 2**53, 1) for _ in range(4000)),
        m.SessionUse("x" * 65, 1, 1),
        *(m.SessionUse(f"s{number}", 1, 1) for number in range(4000)),
    )
    cache = m.CacheUse(total=1, free=1, running=0, waiting=0)
    report = m.Report(epoch=1, state="ready", span=None, cache=cache, sessions=sessions, error="e" * 8192)
    found = trimmed_report(report, lambda peer: True)
    assert len({session.session_id for session in found.sessions}) == len(found.sessions) == 1024
    assert all(len(session.session_id) <= m.MAX_SESSION_ID for session in found.sessions)
    assert len(found.error) == 500


def test_a_registration_has_a_few_addresses() -> None:
    long, good = "a" * 8192, "/ip4/127.0.0.1/tcp/1"
    large = replace(register(), addresses=(good, long, "/ip4/\x1b[2J", *(good,) * 4096), name="n" * 8192)
    found = trimmed_register(large)
    assert found.addresses == (good,) * 14
    assert len(found.name) == 100
    assert trimmed_register(register()) == register()


ESCAPES = ("\x1b[2J", "a\nb", "\x9b31m", "\u202egpj", "\x00", "\u2028")


@pytest.mark.parametrize("text", ESCAPES)
def test_what_a_terminal_would_obey_is_refused(text: str) -> None:
    plain = register()
    shown = [replace(plain, name=text)]
    shown += [replace(plain, profile=replace(plain.profile, **{key: text})) for key in ("device", "dtype")]
    shown.append(replace(plain, profile=replace(plain.profile, quantization=text)))
    for each in shown:
        with pytest.raises(m.MessageError, match="printable"):
            trimmed_register(each)


@pytest.mark.parametrize("text", ESCAPES)
def test_a_report_says_in_one_line_what_went_wrong(text: str) -> None:
    cache = m.CacheUse(total=1, free=1, running=0, waiting=0)
    uses = (m.SessionUse(text, 1, 1), m.SessionUse("s", 1, 1))
    report = m.Report(epoch=1, state="failed", span=None, cache=cache, sessions=uses, error=f"no memory{text}left")
    report = replace(report, rates=tuple(m.RateSample(peer, 1.0) for peer in (text, "p" * 101, "peer", "peer")))
    found = trimmed_report(report, lambda peer: True)
    assert found.rates == (m.RateSample("peer", 1.0),)
    assert found.error.isprintable()
    assert found.error.startswith("no memory")
    assert [use.session_id for use in found.sessions] == ["s"]
