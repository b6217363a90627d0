"""The table of attempts at every entry of a server of a closed swarm: who is refused, and is told why."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.proto import runtime_pb2

from geopetals.credentials.refusal import Refusal
from geopetals.credentials.ticket import digest_of
from geopetals.errors import NotAdmitted, ServerRefused
from geopetals.swarm import gate as gates
from geopetals.swarm.gate import TicketGate
from geopetals.swarm.ring_messages import KEY, PUSH_STREAM, Opening, credential_shown, hello
from geopetals.swarm.stack import DUMMY, pack_args_kwargs
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import error_from_text, frame, read_message, read_metadata, serialize, write_metadata
from tests.issuing import IDENTITY, OTHER_IDENTITY, SWARM, Issuer, changed, new_peer
from tests.swarm.handler_rig import HELD, PEER, TOTAL, Client, Server, play, randn, uids

ME = PEER.to_base58()


class Scene:
    def __init__(self, folder: Path) -> None:
        self.issuer = Issuer(folder / "own")
        self.client = self.issuer.member(peer_id=ME)
        self.trust = self.issuer.trust_source()
        self.foreign = Issuer(folder / "foreign", swarm="foreign").member(peer_id=ME)

    def gate(self) -> TicketGate:
        return TicketGate(self.trust, swarm=SWARM, model_digest=digest_of(IDENTITY), clock=self.issuer.clock)

    def revoke(self) -> None:
        self.issuer.authority.revoke(self.client.token_id)
        self.trust.offer(self.issuer.authority.signed_trust())


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(gates, "_PREDECESSOR_TIMEOUT_S", 0.05)
    return Scene(tmp_path)


def opening(credential: bytes) -> dict[str, Any]:
    return {KEY: Opening(heartbeat_s=1.0, is_last=True, credential=credential).to_dict()}


@contextlib.asynccontextmanager
async def ring(server: Server, credential: bytes, *, max_length: int = 8) -> AsyncIterator[Client]:
    """A hop that a client of our own asks for."""
    client = await server.connect(session_id=f"hop {len(server.tasks)}")
    client.send(client.request(torch.zeros(1, 0, randn(1, 1).shape[-1]), max_length=max_length, **opening(credential)))
    try:
        yield client
    finally:
        client.vanish()


async def answered(client: Client) -> dict[str, Any]:
    """The server's answer to the opening; raises what it refuses with."""
    while True:
        async with asyncio.timeout(20):
            response = await read_message(client.reader, runtime_pb2.ExpertResponse, peer=ME)
        assert response is not None
        metadata = read_metadata(response.metadata)
        if "beat" not in metadata:
            return metadata


def pass_request(credential: bytes, *, backward: bool) -> runtime_pb2.ExpertRequest:
    hidden = randn(1, 2)
    arguments = (hidden, hidden, DUMMY) if backward else (hidden, DUMMY)
    tensors, structure = pack_args_kwargs(*arguments)
    shown = credential_shown(credential) if credential else {}
    return runtime_pb2.ExpertRequest(
        uid=uids(HELD),
        tensors=[serialize(tensor) for tensor in tensors],
        metadata=write_metadata({"args_structure": structure, **shown}),
    )


async def enter_ring(server: Server, credential: bytes) -> None:
    async with ring(server, credential) as client:
        assert KEY in await answered(client)


async def enter_petals(server: Server, credential: bytes) -> None:
    client = await server.connect()
    try:
        await client.begin(8)
    finally:
        client.vanish()


def enter_pass(name: str, *, stream: bool) -> Callable[[Server, bytes], Awaitable[None]]:
    async def enter(server: Server, credential: bytes) -> None:
        request = pass_request(credential, backward="backward" in name)
        if stream:
            await server.call_stream(f"{name}_stream", [request])
        else:
            await server.call(name, request)

    return enter


async def enter_push(server: Server, credential: bytes) -> None:
    request = runtime_pb2.ExpertRequest(metadata=write_metadata({"session_id": "s", **credential_shown(credential)}))
    await server.call("rpc_push", request)


SESSIONS = {"ring": enter_ring}
PASSES = {
    f"{name}{'_stream' if stream else ''}": enter_pass(name, stream=stream)
    for name in ("rpc_forward", "rpc_backward")
    for stream in (False, True)
}
TICKETS: dict[str, tuple[Callable[[Scene], bytes], Refusal]] = {
    "none": (lambda scene: b"", Refusal.MISSING),
    "wrong": (lambda scene: b"secret", Refusal.MALFORMED),
    "forged": (lambda scene: changed(scene.client.signed_ticket(), l=10**6), Refusal.FORGED),
    "expired": (
        lambda scene: scene.client.signed_ticket(expires_at=scene.issuer.clock.now - 3600),
        Refusal.EXPIRED,
    ),
    "foreign peer": (lambda scene: scene.issuer.member(peer_id=new_peer()).signed_ticket(), Refusal.FOREIGN_PEER),
    "foreign model": (
        lambda scene: scene.client.signed_ticket(model_digest=digest_of(OTHER_IDENTITY)),
        Refusal.FOREIGN_MODEL,
    ),
    "foreign swarm": (lambda scene: scene.foreign.signed_ticket(), Refusal.UNKNOWN_KEY),
    "too small": (lambda scene: scene.client.signed_ticket(max_length=3, batch=2), Refusal.TOO_LARGE),
    "other blocks": (lambda scene: scene.client.signed_ticket(blocks=(0, 3)), Refusal.WRONG_BLOCKS),
    "a certificate": (lambda scene: scene.client.signed, Refusal.FORGED),
    "revoked": (lambda scene: revoked(scene, scene.client.signed_ticket()), Refusal.REVOKED),
}
CERTIFICATES: dict[str, tuple[Callable[[Scene], bytes], Refusal]] = {
    "none": (lambda scene: b"", Refusal.MISSING),
    "wrong": (lambda scene: b"secret", Refusal.MALFORMED),
    "forged": (lambda scene: changed(scene.client.signed, r="admin"), Refusal.FORGED),
    "expired": (lambda scene: expired(scene), Refusal.EXPIRED),
    "foreign peer": (lambda scene: scene.issuer.member().signed, Refusal.FOREIGN_PEER),
    "foreign swarm": (lambda scene: scene.foreign.signed, Refusal.UNKNOWN_KEY),
    "a ticket": (lambda scene: scene.client.signed_ticket(), Refusal.FORGED),
    "revoked": (lambda scene: revoked(scene, scene.client.signed), Refusal.REVOKED),
}
ATTEMPTS = [
    *((entry, name, "ticket") for entry in SESSIONS for name in TICKETS),
    *((entry, name, "certificate") for entry in PASSES for name in CERTIFICATES),
]


def revoked(scene: Scene, credential: bytes) -> bytes:
    scene.revoke()
    return credential


def expired(scene: Scene) -> bytes:
    credential = scene.client.signed
    scene.issuer.clock.now += 31 * 86400
    return credential


async def reason_of(entering: Awaitable[None]) -> str:
    with pytest.raises(NotAdmitted) as caught:
        await entering
    return caught.value.reason


@pytest.mark.parametrize(("entry", "name", "kind"), ATTEMPTS, ids=lambda value: str(value))
def test_an_attempt_at_an_entry(stage: Stage, scene: Scene, entry: str, name: str, kind: str) -> None:
    make, refusal = (TICKETS if kind == "ticket" else CERTIFICATES)[name]

    async def scenario(server: Server) -> None:
        assert await reason_of((SESSIONS | PASSES)[entry](server, make(scene))) == refusal
        await server.wait_until(server.is_free)

    play(stage, scenario, gate=scene.gate)


@pytest.mark.parametrize("enter", [enter_petals, enter_push], ids=["rpc_inference", "rpc_push"])
def test_stock_petals_is_told_that_the_swarm_is_closed(
    stage: Stage, scene: Scene, enter: Callable[[Server, bytes], Awaitable[None]]
) -> None:
    async def scenario(server: Server) -> None:
        assert await reason_of(enter(server, scene.client.signed_ticket())) == Refusal.MISSING

    play(stage, scenario, gate=scene.gate)


@pytest.mark.parametrize("entry", [*SESSIONS, *PASSES])
def test_who_shows_what_is_good_is_let_in(stage: Stage, scene: Scene, entry: str) -> None:
    async def scenario(server: Server) -> None:
        if entry in SESSIONS:
            await SESSIONS[entry](server, scene.client.signed_ticket())
        else:
            await PASSES[entry](server, scene.client.signed)
        await server.wait_until(server.is_free)

    with torch.inference_mode(mode=entry in SESSIONS):
        play(stage, scenario, gate=scene.gate)


def test_a_ticket_that_is_in_use_opens_no_second_session(stage: Stage, scene: Scene) -> None:
    async def scenario(server: Server) -> None:
        ticket = scene.client.signed_ticket(max_length=8, batch=1)
        async with ring(server, ticket) as first:
            await answered(first)
            assert await reason_of(enter_ring(server, ticket)) == Refusal.REPLAYED
        await server.wait_until(server.is_free)
        await enter_ring(server, ticket)

    play(stage, scenario, gate=scene.gate)


def test_a_session_whose_ticket_is_revoked_ends_and_frees_its_cache(stage: Stage, scene: Scene) -> None:
    async def scenario(server: Server) -> None:
        async with ring(server, scene.client.signed_ticket()) as client:
            await answered(client)
            assert not server.is_free()
            scene.revoke()
            assert await reason_of(answered(client)) == Refusal.REVOKED
            await server.wait_until(lambda: server.budget.left == TOTAL)

    play(stage, scenario, gate=scene.gate)


def test_a_push_stream_finds_no_session_that_was_not_let_in(stage: Stage, scene: Scene) -> None:
    """And into one that was, only the peer may push whom its client has named."""

    async def push_into(server: Server, session_id: str) -> None:
        reader, writer = await server.open(PUSH_STREAM)
        writer.write(frame(runtime_pb2.ExpertRequest(metadata=hello(session_id))))
        try:
            async with asyncio.timeout(20):
                await read_message(reader, runtime_pb2.ExpertResponse, peer=ME)
        finally:
            writer.transport.abort()

    async def scenario(server: Server) -> None:
        async with ring(server, scene.client.signed_ticket()) as client:
            await answered(client)
            with pytest.raises(ServerRefused, match="no session here that you may push into"):
                await push_into(server, str(client.session_id))

    play(stage, scenario, gate=scene.gate)


def test_rpc_info_answers_everybody_and_names_nobody(stage: Stage, scene: Scene) -> None:
    async def scenario(server: Server) -> None:
        ticket = scene.client.signed_ticket(session_id="a-secret-name")
        async with ring(server, ticket) as client:
            await answered(client)
            info = await server.call("rpc_info", runtime_pb2.ExpertUID())
        for secret in (b"a-secret-name", ME.encode(), ticket, scene.client.signed, scene.client.token_id.encode()):
            assert secret not in info.serialized_info

    play(stage, scenario, gate=scene.gate)


def test_the_reason_travels_as_unary_calls_tell_errors() -> None:
    error = NotAdmitted("the ticket has expired.", reason=Refusal.EXPIRED)
    told = error_from_text(repr(error), ME)
    assert isinstance(told, NotAdmitted)
    assert told.reason == Refusal.EXPIRED
    assert "the ticket has expired" in str(told)
