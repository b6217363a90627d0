"""A server's conversation with a coordinator that answers as a table says."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from geopetals.coordinator.messages import Done, Limits, Register, Registered, Report, Reported, Span, Welcome
from geopetals.errors import Busy, ControlLost, NotAdmitted, SwarmMismatch
from geopetals.progress import Silent
from geopetals.swarm import member as member_module
from geopetals.swarm.assignments import Standing
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.member import Member, Self
from geopetals.swarm.rates import Rates
from tests.event_loop import in_loop
from tests.swarm.test_profiling import profile

IDENTITY = ModelIdentity(model="tiny", config_hash="0" * 64, revision=None, fingerprint="1" * 64)
OTHER = ModelIdentity(model="other", config_hash="2" * 64, revision=None, fingerprint=None)
SPAN = Span(0, 3)


class FakeChannel:
    """Answers by method; an exception among the answers is raised. Without an answer the channel is lost."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.closed = asyncio.Event()

    async def call(self, method: str, body: dict[str, Any], *, timeout_s: float = 10) -> dict[str, Any]:
        self.calls.append((method, body))
        answers = self.answers.get(method, [])
        answer = answers.pop(0) if answers else ControlLost("the channel ended.")
        if isinstance(answer, Exception):
            raise answer
        return answer.to_dict()  # type: ignore[no-any-return]

    def close(self) -> None:
        self.closed.set()

    def said(self, method: str) -> list[dict[str, Any]]:
        return [body for name, body in self.calls if name == method]


class FakeMembership:
    def __init__(self) -> None:
        self.token = SimpleNamespace(coordinator=SimpleNamespace(peer_id="c", addresses=()), credential="gp2secret")
        self.certificate = b""
        self.trust: list[bytes] = []

    def welcomed(self, certificate: bytes, trust: bytes) -> None:
        self.certificate = certificate

    def heard(self, trust: bytes) -> None:
        self.trust.append(trust)


class FakeAssignments:
    standing = Standing(state="joining", span=None, epoch=0)

    def __init__(self) -> None:
        self.adopted: list[Registered] = []

    def adopt(self, answer: Registered) -> None:
        self.adopted.append(answer)
        self.standing = Standing(state="ready", span=answer.span, epoch=answer.epoch)

    def next_to_tell(self) -> tuple[Standing, bool]:
        return self.standing, False


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, *channels: FakeChannel | Exception) -> None:
        self.channels = list(channels)
        self.membership, self.assignments = FakeMembership(), FakeAssignments()
        self.service = SimpleNamespace(
            holding=None,
            cache=lambda: {"total": 100, "free": 40, "running": 1, "waiting": 0},
            sessions=lambda: [("s1", 60, 12)],
            rates=Rates(),
        )
        self.exhausted = asyncio.Event()
        self.greetings = 0
        monkeypatch.setattr(member_module, "dial", self._dial)
        monkeypatch.setattr(member_module, "connect", self._connect)
        monkeypatch.setattr(member_module, "_FIRST_DELAY_S", 0.0)
        monkeypatch.setattr(member_module, "_REFUSED_DELAY_S", 0.0)
        monkeypatch.setattr(member_module, "REPORT_S", 0.001)
        network = SimpleNamespace(peer_id="me", p2p=None, is_relayed=False, addresses=self._addresses)
        place: Any = SimpleNamespace(network=network)
        limits = Limits(memory_bytes=1000)
        fakes: dict[str, Any] = {
            "membership": self.membership,
            "self_description": Self(identity=IDENTITY, profile=profile(), limits=limits, name="Ada"),
            "service": self.service,
            "assignments": self.assignments,
        }
        self.member = Member(place=place, reporter=Silent(), on_connected=self._connected, **fakes)

    async def run(self) -> None:
        """Until all channels are used up."""
        task = asyncio.create_task(self.member.run())
        waiting = asyncio.create_task(self.exhausted.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _dial(self, p2p: Any, peer_id: str, **_: Any) -> FakeChannel:
        if not self.channels:
            self.exhausted.set()
            raise ControlLost("nobody is there.")
        channel = self.channels.pop(0)
        if isinstance(channel, Exception):
            raise channel
        return channel

    async def _connect(self, p2p: Any, addresses: Any) -> None:
        return None

    async def _addresses(self) -> tuple[str, ...]:
        return ("/ip4/127.0.0.1/tcp/1/p2p/me",)

    async def _connected(self) -> None:
        self.greetings += 1


def welcome(
    identity: ModelIdentity = IDENTITY, *, certificate: bytes = b"certificate", trust_version: int = 1
) -> Welcome:
    return Welcome(
        certificate=certificate,
        trust=b"trust",
        trust_version=trust_version,
        swarm="tiny",
        model="tiny",
        identity=identity.to_dict(),
        open=False,
        heartbeat_s=2.0,
        now=0.0,
    )


REGISTERED = Registered(epoch=4, span=SPAN, reason="a test")
OK = Reported(trust_version=1)


@in_loop
async def test_it_joins_registers_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = FakeChannel(
        hello=[welcome()], register=[REGISTERED], report=[OK, Reported(trust_version=1, trust=b"new")]
    )
    rig = Rig(monkeypatch, channel)
    await rig.run()
    assert [method for method, _ in channel.calls] == ["hello", "register", "report", "report", "report"]
    register = Register.from_dict(channel.said("register")[0])
    assert (register.held, register.epoch, register.name) == (None, 0, "Ada")
    report = Report.from_dict(channel.said("report")[0])
    assert (report.epoch, report.state, report.span) == (4, "ready", SPAN)
    assert (report.cache.total, report.cache.free) == (100, 40)
    assert [tuple(use) for use in report.sessions] == [("s1", 60, 12)]
    assert rig.membership.trust == [b"new"]
    assert channel.closed.is_set()


@in_loop
async def test_a_coordinator_that_comes_back_hears_what_is_held_and_sees_the_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = FakeChannel(hello=[welcome()], register=[REGISTERED], report=[OK])
    second = FakeChannel(hello=[welcome()], register=[REGISTERED], report=[OK])
    rig = Rig(monkeypatch, first, ControlLost("away."), P2PDaemonError("p2pd has died"), BrokenPipeError(), second)
    rig.service.holding = SimpleNamespace(span=(0, 3))
    await rig.run()
    assert [hello["certificate"] for hello in (*first.said("hello"), *second.said("hello"))] == [b"", b"certificate"]
    register = Register.from_dict(second.said("register")[0])
    assert (register.held, register.epoch) == (SPAN, 4)


@in_loop
async def test_a_coordinator_that_does_not_know_it_any_more_hears_it_all_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forgot = Reported(trust_version=1, known=False)
    channel = FakeChannel(hello=[welcome()], register=[REGISTERED, REGISTERED], report=[OK, forgot, OK])
    await Rig(monkeypatch, channel).run()
    assert [method for method, _ in channel.calls][:6] == [
        "hello",
        "register",
        "report",
        "report",
        "register",
        "report",
    ]


@in_loop
async def test_the_certificate_is_renewed_when_trust_changes_and_records_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = Reported(trust_version=2, trust=b"new")
    channel = FakeChannel(
        hello=[welcome(), Busy("too many calls."), welcome(certificate=b"fresh", trust_version=2)],
        register=[REGISTERED],
        report=[OK, changed, changed, changed],
    )
    rig = Rig(monkeypatch, channel)
    await rig.run()
    assert [method for method, _ in channel.calls] == [
        *("hello", "register", "report"),
        *("report", "hello"),  # which the coordinator is too busy for
        *("report", "hello"),
        *("report", "report"),
    ]
    assert [body["certificate"] for body in channel.said("hello")] == [b"", b"certificate", b"certificate"]
    assert rig.membership.certificate == b"fresh"
    assert rig.greetings == 2


@in_loop
async def test_the_certificate_is_renewed_before_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module, "_HELLO_S", 0.0)
    channel = FakeChannel(hello=[welcome(), welcome(certificate=b"fresh")], register=[REGISTERED], report=[OK])
    rig = Rig(monkeypatch, channel)
    await rig.run()
    assert [body["certificate"] for body in channel.said("hello")] == [b"", b"certificate"]
    assert rig.membership.certificate == b"fresh"


@in_loop
async def test_who_may_not_join_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotAdmitted, match="revoked"):
        await Rig(monkeypatch, FakeChannel(hello=[NotAdmitted("the token has been revoked.")])).run()
    with pytest.raises(SwarmMismatch, match="another one"):
        await Rig(monkeypatch, FakeChannel(hello=[welcome(OTHER)])).run()


@in_loop
async def test_a_certificate_that_is_refused_gives_way_to_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    first = FakeChannel(hello=[welcome()], register=[REGISTERED], report=[OK])
    second = FakeChannel(hello=[NotAdmitted("the certificate has expired.")])
    third = FakeChannel(hello=[welcome()], register=[REGISTERED])
    rig = Rig(monkeypatch, first, second, third)
    await rig.run()
    assert (second.said("hello")[0]["certificate"], third.said("hello")[0]["certificate"]) == (b"certificate", b"")
    assert len(rig.assignments.adopted) == 2


@in_loop
async def test_who_has_said_goodbye_does_not_register_again(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = FakeChannel(hello=[welcome()], register=[REGISTERED], report=[OK] * 1000, leave=[Done()])
    rig = Rig(monkeypatch, channel, FakeChannel())
    running = asyncio.create_task(rig.member.run())
    while not channel.said("report"):  # noqa: ASYNC110 - nobody announces what is waited for
        await asyncio.sleep(0)
    channel.answers["report"] = [Reported(trust_version=1, known=False)] * 3
    await rig.member.leave()
    await running
    assert (len(channel.said("register")), len(channel.said("leave")), len(rig.channels)) == (1, 1, 1)
