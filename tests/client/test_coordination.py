"""A client and its coordinator: leave for sessions, waiting, growth, ends, and what happens when nobody answers."""

import asyncio
from typing import Any

import pytest

from geopetals.client import coordination
from geopetals.client.coordination import Coordination
from geopetals.client.lease import Lease, Waiting
from geopetals.client.routing import Hop
from geopetals.coordinator.messages import (
    Admitted,
    Extended,
    LinkSample,
    LinksTaken,
    Measured,
    Queued,
    Refused,
    RunningSession,
)
from geopetals.errors import Busy, ControlLost, NetworkError, NotAdmitted, ServerRefused
from geopetals.swarm.wire import WireError
from tests.client.fake_coordinator import (
    CHAIN,
    PREDICTED,
    FakeCoordinator,
    admitted,
    coordinated,
    eventually,
    queued,
    welcome,
)
from tests.event_loop import in_loop

ROUTE = tuple(Hop(peer_id=hop.peer_id, start=hop.start, end=hop.end) for hop in CHAIN)


def lease_of(client: Coordination, seen: list[Waiting] | None = None) -> Lease:
    return Lease(client, output_tokens=8, on_wait=None if seen is None else seen.append)


async def decide(lease: Lease) -> None:
    await lease.decide(batch=2, max_length=20, prompt_tokens=12)


async def running(client: Coordination) -> Lease:
    lease = lease_of(client)
    await decide(lease)
    lease.route, lease.tokens_used = ROUTE, 14
    return lease


@in_loop
async def test_a_session_is_asked_for_with_its_size_after_links_were_told() -> None:
    async with coordinated() as (client, coordinator):
        lease = await running(client)
        assert (lease.credential, lease.advice, lease.is_coordinated) == (b"ticket", CHAIN, True)
        assert [method for method, _ in coordinator.calls] == ["hello", "links", "open"]
        assert coordinator.asked("hello")[0]["token"] == "gp2token"
        assert coordinator.asked("links")[0]["links"] == [["a", 0.05, False], ["b", 0.05, False]]
        asked = coordinator.asked("open")[0]
        assert (asked["batch"], asked["max_length"], asked["prompt_tokens"], asked["output_tokens"]) == (2, 20, 12, 8)
        await decide(lease)
        assert len(coordinator.asked("open")) == 1


@in_loop
async def test_a_queued_session_sees_its_place_and_is_woken() -> None:
    async with coordinated() as (client, coordinator):
        coordinator.answers["open"] = queued(2, 4.2)
        seen: list[Waiting] = []
        lease = lease_of(client, seen)
        deciding = asyncio.create_task(decide(lease))
        session_id = (await coordinator.hears("open"))["session_id"]
        await eventually(lambda: lease.waiting is not None)
        coordinator.notify("queue", Queued(session_id=session_id, position=0, start_in_s=1.0).to_dict())
        admission = Admitted(session_id=session_id, ticket=b"later", chain=CHAIN, predicted=PREDICTED)
        coordinator.notify("admitted", admission.to_dict())
        await deciding
        assert lease.ticket == b"later"
        assert lease.waiting is None
        assert [str(waiting) for waiting in seen] == [
            "queued: 3rd, starts in about 4 s",
            "queued: 1st, starts in about 1 s",
        ]


@pytest.mark.parametrize("at_once", [True, False])
@in_loop
async def test_a_full_queue_says_when_to_come_back(at_once: bool) -> None:
    async with coordinated() as (client, coordinator):
        coordinator.answers["open"] = Busy("the queue is full.", retry_after_s=7.0) if at_once else queued(0, 1.0)
        lease = lease_of(client)
        deciding = asyncio.create_task(decide(lease))
        session_id = (await coordinator.hears("open"))["session_id"]
        if not at_once:
            refused = Refused(session_id=session_id, why="the queue is full.", retry_after_s=7.0)
            coordinator.notify("refused", refused.to_dict())
        with pytest.raises(Busy, match="the queue is full") as caught:
            await deciding
        assert caught.value.retry_after_s == 7.0
        assert not lease.is_decided
        coordinator.answers["open"] = admitted()
        await decide(lease)
        assert coordinator.asked("open")[1]["session_id"] != session_id


@in_loop
async def test_a_queue_that_does_not_move_is_left() -> None:
    async with coordinated(queue_timeout_s=0.5) as (client, coordinator):
        coordinator.answers["open"] = queued(0, 33.0)
        with pytest.raises(Busy, match="no cache within") as caught:
            await decide(lease_of(client))
        assert caught.value.retry_after_s == 33.0
        cancelled = await coordinator.hears("cancel")
        assert cancelled["session_id"] == coordinator.asked("open")[0]["session_id"]


@in_loop
async def test_ctrl_c_gives_the_place_up() -> None:
    async with coordinated() as (client, coordinator):
        coordinator.answers["open"] = queued(0, 33.0)
        deciding = asyncio.create_task(decide(lease_of(client)))
        session_id = (await coordinator.hears("open"))["session_id"]
        deciding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deciding
        assert (await coordinator.hears("cancel"))["session_id"] == session_id


async def restart(coordinator: FakeCoordinator) -> None:
    coordinator.kill()
    coordinator.is_up = True


@in_loop
async def test_who_waits_asks_a_restarted_coordinator_again() -> None:
    async with coordinated() as (client, coordinator):
        coordinator.answers["open"] = queued(0, 33.0)
        lease = lease_of(client)
        deciding = asyncio.create_task(decide(lease))
        session_id = (await coordinator.hears("open"))["session_id"]
        await eventually(lambda: lease.waiting is not None)
        coordinator.answers["open"] = admitted(b"second")
        await restart(coordinator)
        await deciding
        assert lease.ticket == b"second"
        assert coordinator.asked("open")[1]["session_id"] == session_id


@in_loop
async def test_running_sessions_are_resumed_and_ended_ones_closed() -> None:
    async with coordinated() as (client, coordinator):
        going, over = await running(client), await running(client)
        over_id = over.session_id
        coordinator.kill()
        over.clock.step(0.1)
        over.close()
        coordinator.is_up = True
        resumed = await coordinator.hears("resume")
        expected = RunningSession(session_id=going.session_id, ticket=b"ticket", chain=CHAIN, tokens_used=14)
        assert resumed["sessions"] == [expected.to_dict()]
        closed = await coordinator.hears("close")
        assert closed["session_id"] == over_id
        assert Measured.from_dict(closed["measured"]).tokens == 1
        assert coordinator.asked("hello")[1]["certificate"] == b"certificate"
        assert coordinator.asked("hello")[1]["token"] == ""


@in_loop
async def test_many_sessions_are_resumed_in_messages_of_some_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordination, "_RESUMED_AT_ONCE", 2)
    async with coordinated() as (client, coordinator):
        leases = [await running(client) for _ in range(3)]
        await restart(coordinator)
        await coordinator.hears("resume", times=2)
        told = [session["session_id"] for body in coordinator.asked("resume") for session in body["sessions"]]
        assert [len(body["sessions"]) for body in coordinator.asked("resume")] == [2, 1]
        assert told == [lease.session_id for lease in leases]


@pytest.mark.parametrize("error", [ConnectionError("p2pd has died"), WireError("too long"), NetworkError("none.")])
@in_loop
async def test_the_coordinator_is_called_again_whatever_failed(error: Exception) -> None:
    failures = [error]

    async def fails_once(named: tuple[str, ...]) -> tuple[LinkSample, ...]:
        if failures:
            raise failures.pop()
        return ()

    async with coordinated(measure=fails_once) as (client, coordinator):
        await coordinator.hears("links")
        await eventually(lambda: client.is_connected)
        assert len(coordinator.asked("hello")) == 2


@in_loop
async def test_a_certificate_that_is_refused_is_replaced_by_the_token() -> None:
    def hello(body: dict[str, Any]) -> dict[str, Any]:
        if body["certificate"]:
            raise NotAdmitted("the certificate has expired.", reason="expired")
        return welcome()

    async with coordinated() as (client, coordinator):
        coordinator.answers["hello"] = hello
        await running(client)
        await restart(coordinator)
        await coordinator.hears("resume")
        assert [body["token"] for body in coordinator.asked("hello")] == ["gp2token", "", "gp2token"]


@in_loop
async def test_the_certificate_is_renewed_when_trust_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordination, "_IDLE_LINKS_S", 0.01)
    async with coordinated() as (_, coordinator):
        await coordinator.hears("links", times=3)
        assert len(coordinator.asked("hello")) == 1
        coordinator.answers["hello"] = welcome(trust_version=2, certificate=b"fresh")
        coordinator.answers["links"] = LinksTaken(trust_version=2).to_dict()
        assert (await coordinator.hears("hello", times=2))["certificate"] == b"certificate"
        await coordinator.hears("links", times=len(coordinator.asked("links")) + 3)
        assert len(coordinator.asked("hello")) == 2


@in_loop
async def test_the_end_of_a_session_is_told_with_its_times() -> None:
    async with coordinated() as (client, coordinator):
        lease = await running(client)
        for took_s in (0.5, 0.1, 0.3):
            lease.clock.step(took_s)
        lease.clock.failovers = 1
        lease.close()
        lease.close()
        told = Measured.from_dict((await coordinator.hears("close"))["measured"])
        assert (told.tokens, told.failovers, told.tpot_s) == (3, 1, pytest.approx(0.2))
        assert told.ttft_s is not None
        assert told.end_to_end_s is not None
        assert told.ttft_s <= told.end_to_end_s
    assert len(coordinator.asked("close")) == 1


@in_loop
async def test_sessions_go_alone_where_no_coordinator_answers() -> None:
    async with coordinated(is_up=False) as (client, _):
        lease = lease_of(client)
        await decide(lease)
        assert (lease.is_decided, lease.is_coordinated, lease.credential, lease.advice) == (True, False, b"", ())
        lease.close()


@in_loop
async def test_the_ticket_for_such_times_is_shown_then() -> None:
    async with coordinated() as (client, coordinator):
        before = await running(client)
        coordinator.kill()
        lease = lease_of(client)
        await decide(lease)
        assert lease.credential == b"standby"
        assert before.credential == b"ticket"
        with pytest.raises(ControlLost):
            await client.extend(before.session_id, 100)
        assert not await before.extend(100)


@in_loop
async def test_a_refused_token_is_no_absent_coordinator() -> None:
    async with coordinated() as (client, coordinator):
        coordinator.answers["hello"] = NotAdmitted("the token was revoked: ask for a new one.", reason="revoked")
        with pytest.raises(NotAdmitted, match="revoked"):
            await decide(lease_of(client))


@in_loop
async def test_a_session_grows_with_another_ticket() -> None:
    async with coordinated() as (client, coordinator):
        coordinator.answers["extend"] = Extended(ticket=b"longer").to_dict()
        lease = await running(client)
        assert not await lease.extend(20)
        assert await lease.extend(21)
        assert (lease.ticket, coordinator.asked("extend")[0]["max_length"]) == (b"longer", 21 + 256)
        assert not await lease.extend(200)

        def small(body: dict[str, Any]) -> dict[str, Any]:
            if body["max_length"] > 1000:
                raise Busy("all cache is taken.", retry_after_s=1.0)
            return Extended(ticket=b"little").to_dict()

        coordinator.answers["extend"] = small
        assert await lease.extend(999)
        assert (lease.ticket, lease.max_length) == (b"little", 999)
        with pytest.raises(Busy):
            await lease.extend(1001)


@in_loop
async def test_a_session_that_the_coordinator_does_not_know_goes_by_what_there_is() -> None:
    async with coordinated() as (client, coordinator):
        coordinator.answers["extend"] = ServerRefused("the coordinator does not know this session.")
        lease = await running(client)
        assert not await lease.extend(100)
        assert lease.credential == b"ticket"
        await lease.renew_for(NotAdmitted("the ticket is for 20 tokens.", reason="too_large"))
        assert lease.credential == b"standby"


@in_loop
async def test_a_session_that_was_given_up_does_not_ask_for_more() -> None:
    async with coordinated() as (client, coordinator):
        coordinator.answers["extend"] = Busy("There is no such session.", retry_after_s=1.0)
        lease = await running(client)
        lost = Refused(session_id=lease.session_id, why="its servers have gone.", retry_after_s=0.0)
        coordinator.notify("refused", lost.to_dict())
        await eventually(lambda: lease.is_lost)
        assert not await lease.extend(100)
        await lease.renew_for(NotAdmitted("the ticket is for 20 tokens.", reason="too_large"))
        assert (coordinator.asked("extend"), lease.credential) == ([], b"ticket")


@in_loop
async def test_a_ticket_that_has_expired_is_replaced() -> None:
    async with coordinated() as (client, coordinator):
        coordinator.answers["extend"] = Extended(ticket=b"fresh").to_dict()
        lease = await running(client)
        await lease.renew_for(NotAdmitted("revoked.", reason="revoked"))
        assert lease.ticket == b"ticket"
        await lease.renew_for(NotAdmitted("expired.", reason="expired"))
        assert (lease.credential, coordinator.asked("extend")[0]["max_length"]) == (b"fresh", 20)
        coordinator.answers["extend"] = Extended(ticket=b"of the new key").to_dict()
        await lease.renew_for(NotAdmitted("the key is not one of the swarm's.", reason="unknown_key"))
        assert lease.credential == b"of the new key"
        coordinator.kill()
        assert not await lease.extend(30)
        await lease.renew_for(NotAdmitted("the ticket is for 20 tokens.", reason="too_large"))
        assert lease.credential == b"standby"


@in_loop
async def test_a_session_that_was_given_up_asks_again() -> None:
    async with coordinated() as (client, coordinator):
        lease = await running(client)
        first = lease.session_id
        coordinator.notify("refused", Refused(session_id=first, why="idle.", retry_after_s=0.0).to_dict())
        await eventually(lambda: lease.is_lost)
        coordinator.answers["open"] = admitted(b"another")
        await decide(lease)
        assert (lease.ticket, len(coordinator.asked("open"))) == (b"ticket", 1)
        lease.forget()
        await decide(lease)
        assert (lease.ticket, lease.is_lost) == (b"another", False)
        assert lease.session_id != first
        lease.close()
        assert (await coordinator.hears("close"))["session_id"] == coordinator.asked("open")[1]["session_id"]


@pytest.mark.parametrize("method", ["hello", "links", "open"])
@in_loop
async def test_answers_that_are_none_are_as_no_answer(method: str) -> None:
    async with coordinated(queue_timeout_s=3.0) as (client, coordinator):
        sound = coordinator.answers[method]
        coordinator.answers[method] = {"nonsense": 1}
        deciding = asyncio.create_task(decide(lease := lease_of(client)))
        await coordinator.hears(method)
        coordinator.answers[method] = sound
        await deciding
        assert lease.is_decided


@in_loop
async def test_notes_that_cannot_be_read_are_passed_over() -> None:
    async with coordinated() as (client, coordinator):
        coordinator.answers["open"] = queued(0, 1.0)
        deciding = asyncio.create_task(decide(lease := lease_of(client)))
        session_id = (await coordinator.hears("open"))["session_id"]
        for method, body in (("admitted", {}), ("queue", {"session_id": 3}), ("novelty", {"x": 1})):
            coordinator.notify(method, body)
        other = Admitted(session_id="another", ticket=b"", chain=CHAIN, predicted=PREDICTED)
        coordinator.notify("admitted", other.to_dict())
        coordinator.notify("refused", Refused(session_id="another", why="", retry_after_s=0.0).to_dict())
        coordinator.notify("admitted", {**other.to_dict(), "session_id": session_id, "ticket": b"mine"})
        await deciding
        assert lease.ticket == b"mine"


@pytest.mark.parametrize(
    ("position", "text"),
    [(0, "1st"), (1, "2nd"), (2, "3rd"), (3, "4th"), (10, "11th"), (11, "12th"), (20, "21st"), (110, "111th")],
)
def test_places_in_words(position: int, text: str) -> None:
    assert str(Waiting(position=position)) == f"queued: {text}"
