"""What a gate lets in, without a server behind it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from geopetals.credentials.certificate import Role
from geopetals.credentials.refusal import Refusal
from geopetals.credentials.ticket import TicketKind, digest_of
from geopetals.errors import NotAdmitted
from geopetals.swarm import gate as gates
from geopetals.swarm.cache_growth import CacheGrowth
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.gate import Grant, OpenGate, TicketGate
from geopetals.swarm.kv_budget import KVBudget
from geopetals.swarm.stage import Stage
from tests.issuing import IDENTITY, SWARM, Issuer, new_peer
from tests.swarm.handler_rig import HELD

SPAN = range(1, 4)


class Scene:
    """One client with a ticket for 2 sequences of 16 tokens in 6 blocks, at one server's gate."""

    def __init__(self, folder: Path) -> None:
        self.issuer = Issuer(folder)
        self.trust = self.issuer.trust_source()
        self.gate = TicketGate(self.trust, swarm=SWARM, model_digest=digest_of(IDENTITY), clock=self.issuer.clock)
        self.client = self.issuer.member()
        self.held = AsyncExitStack()

    async def enter(self, credential: bytes | None = None, peer_id: str | None = None, **change: Any) -> Grant:
        asked = {"span": SPAN, "batch": 2, "max_length": 16, **change}
        shown = self.client.signed_ticket() if credential is None else credential
        return await self.held.enter_async_context(self.gate.opening(peer_id or self.client.peer_id, shown, **asked))

    async def refusal(self, *args: Any, **change: Any) -> str:
        with pytest.raises(NotAdmitted) as caught:
            await self.enter(*args, **change)
        return caught.value.reason


def play(folder: Path, scenario: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await scenario(Scene(folder))

    asyncio.run(main())


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_PREDECESSOR_TIMEOUT_S", 0.05)


def test_a_ticket_opens_its_session_and_says_what_it_is_called(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        grant = await scene.enter()
        assert grant.session_id == "session"
        assert grant.longest(1000) == 16
        assert grant.longest(10) == 10

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"credential": b""}, Refusal.MISSING),
        ({"max_length": 17}, Refusal.TOO_LARGE),
        ({"batch": 3}, Refusal.TOO_LARGE),
        ({"span": range(1, 7)}, Refusal.WRONG_BLOCKS),
        ({"peer_id": new_peer()}, Refusal.FOREIGN_PEER),
    ],
)
def test_what_a_ticket_does_not_cover(tmp_path: Path, change: dict[str, Any], reason: Refusal) -> None:
    async def scenario(scene: Scene) -> None:
        assert await scene.refusal(**change) == reason
        await scene.enter()

    play(tmp_path, scenario)


def test_one_long_sequence_may_take_what_two_short_ones_would(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        grant = await scene.enter(batch=1, max_length=20)
        assert grant.longest(1000) == 32

    play(tmp_path, scenario)


def test_the_tokens_of_a_ticket_are_given_out_once_at_a_time(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        ticket = scene.client.signed_ticket()
        first = await scene.enter(ticket, max_length=8)
        second = await scene.enter(ticket, max_length=8)
        assert await scene.refusal(ticket, max_length=1) == Refusal.REPLAYED
        assert first.longest(1000) == second.longest(1000) == 8
        await scene.enter(ticket, span=range(4, 6))  # other blocks of the same session: a chain that comes back here
        assert await scene.refusal(ticket, span=range(3, 5), max_length=9) == Refusal.REPLAYED
        await scene.enter(scene.client.signed_ticket(session_id="other"))
        await scene.held.aclose()
        await scene.enter(ticket)

    play(tmp_path, scenario)


def test_growth_counts(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        grant = await scene.enter(max_length=4)
        grant.grown(12)
        assert await scene.refusal(max_length=5) == Refusal.REPLAYED
        other = await scene.enter(max_length=4)
        assert (grant.longest(1000), other.longest(1000)) == (12, 4)

    play(tmp_path, scenario)


def test_a_session_that_is_opened_anew_waits_for_the_end_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "_PREDECESSOR_TIMEOUT_S", 20.0)

    async def scenario(scene: Scene) -> None:
        await scene.enter()
        old, scene.held = scene.held, AsyncExitStack()
        again = asyncio.create_task(scene.enter())
        await asyncio.sleep(0)
        assert not again.done()
        await old.aclose()
        assert (await again).longest(1000) == 16

    play(tmp_path, scenario)


def test_the_last_moment_is_not_too_late(tmp_path: Path) -> None:
    """The old session ends in the same turn of the loop in which the new one's time is over."""

    async def scenario(scene: Scene) -> None:
        await scene.enter()
        old, scene.held = scene.held, AsyncExitStack()
        again = asyncio.create_task(scene.enter())
        await asyncio.sleep(0)

        def release() -> None:
            with suppress(StopIteration):
                old.aclose().send(None)

        asyncio.get_running_loop().call_later(gates._PREDECESSOR_TIMEOUT_S + 0.01, release)
        time.sleep(2 * gates._PREDECESSOR_TIMEOUT_S)  # noqa: ASYNC251 - so that both are due
        await again
        assert await scene.refusal(max_length=1) == Refusal.REPLAYED
        await scene.held.aclose()
        await scene.enter()

    play(tmp_path, scenario)


def test_a_standby_ticket_opens_sessions_of_any_name_within_its_tokens(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        standby = scene.client.signed_ticket(kind=TicketKind.STANDBY, session_id="")
        first = await scene.enter(standby, max_length=8)
        await scene.enter(standby, max_length=8)
        assert first.session_id == ""
        assert await scene.refusal(standby, max_length=8) == Refusal.REPLAYED

    play(tmp_path, scenario)


def test_a_later_ticket_lets_the_session_grow(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        grant = await scene.enter()
        grant.extend(scene.client.signed_ticket(max_length=64))
        assert grant.longest(1000) == 64
        for wrong, reason in (
            (scene.client.signed_ticket(session_id="other"), Refusal.REPLAYED),
            (scene.client.signed_ticket(kind=TicketKind.STANDBY), Refusal.REPLAYED),
            (scene.issuer.member().signed_ticket(), Refusal.FOREIGN_PEER),
            (b"", Refusal.MISSING),
        ):
            with pytest.raises(NotAdmitted) as caught:
                grant.extend(wrong)
            assert caught.value.reason == reason
        assert grant.longest(1000) == 64

    play(tmp_path, scenario)


def test_revocation_ends_sessions_that_run(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        grant, ended = await scene.enter(), list[NotAdmitted]()
        grant.on_revoked = ended.append
        scene.issuer.authority.rotate()
        scene.trust.offer(scene.issuer.authority.signed_trust())
        assert ended == []
        scene.issuer.authority.revoke(scene.client.token_id)
        scene.trust.offer(scene.issuer.authority.signed_trust())
        assert [error.reason for error in ended] == [Refusal.REVOKED]
        assert await scene.refusal(session_id_again(scene)) == Refusal.REVOKED

    def session_id_again(scene: Scene) -> bytes:
        return scene.client.signed_ticket(session_id="again")

    play(tmp_path, scenario)


@pytest.mark.parametrize("role", [Role.CLIENT, Role.ADMIN, Role.SERVER])
def test_members_may_compute_passes(tmp_path: Path, role: Role) -> None:
    async def scenario(scene: Scene) -> None:
        member = scene.issuer.member(role)
        scene.gate.admit_pass(member.peer_id, member.signed)
        with pytest.raises(NotAdmitted):
            scene.gate.admit_pass(new_peer(), member.signed)

    play(tmp_path, scenario)


def test_relays_may_not_compute(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        relay = scene.issuer.member(Role.RELAY)
        with pytest.raises(NotAdmitted) as caught:
            scene.gate.admit_pass(relay.peer_id, relay.signed)
        assert caught.value.reason == Refusal.WRONG_ROLE

    play(tmp_path, scenario)


def test_an_open_swarm_lets_in_who_shows_nothing_and_checks_what_is_shown(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        for gate in (OpenGate(), OpenGate(scene.gate)):
            async with gate.opening("anybody", b"", span=SPAN, batch=9, max_length=999) as grant:
                assert grant.longest(1000) == 1000
                assert (grant.ticket, grant.session_id) == (None, "")
            gate.admit_pass("anybody", b"")
            gate.admit_push("anybody")
        ticketed = OpenGate(scene.gate)
        shown = scene.client.signed_ticket()
        async with ticketed.opening(scene.client.peer_id, shown, span=SPAN, batch=1, max_length=9) as grant:
            assert grant.session_id == "session"
        with pytest.raises(NotAdmitted):
            async with ticketed.opening("anybody", shown, span=SPAN, batch=1, max_length=9):
                pass

    play(tmp_path, scenario)


def test_a_cache_grows_as_far_as_the_ticket_goes_and_further_with_a_later_one(tmp_path: Path, stage: Stage) -> None:
    async def scenario(scene: Scene) -> None:
        budget, compute = KVBudget(10_000), ComputeThread(asyncio.get_running_loop())
        async with budget.reserve(len(HELD) * 2 * 4, timeout_s=0) as reservation:
            kv = stage.allocate_kv(HELD.start, HELD.stop, batch=2, max_length=4)
            grant = await scene.enter(span=HELD, max_length=4)
            growth = CacheGrowth(kv, reservation, compute, limit=1000, grant=grant)
            await growth.make_room(16)
            assert kv.max_length == 16  # not the quarter more that there is room for
            with pytest.raises(NotAdmitted) as caught:
                await growth.make_room(17)
            assert caught.value.reason == Refusal.TOO_LARGE
            assert reservation.amount == len(HELD) * 2 * 16
            grant.extend(scene.client.signed_ticket(max_length=40))
            await growth.make_room(17)
            assert kv.max_length == 40
        compute.stop()
        assert await asyncio.to_thread(compute.join, 10)

    play(tmp_path, scenario)
