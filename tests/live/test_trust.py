"""A closed swarm of separate processes: who is let in, who is not and why, and what becomes of who is revoked."""

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.client.hop import HopSession
from geopetals.client.pass_calls import PassOptions, call_backward, call_forward
from geopetals.client.routing import Hop
from geopetals.credentials.authority import Authority
from geopetals.credentials.certificate import Role
from geopetals.credentials.refusal import Refusal
from geopetals.errors import GeoPetalsError, NoChain, NotAdmitted
from geopetals.join_token import JoinToken
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.records import announce, read_servers
from geopetals.swarm.ring_messages import VERSION, Opening
from geopetals.swarm.stack import ServerInfo, ServerState
from tests.issuing import Issuer
from tests.live.commands import wait_for
from tests.live.conftest import Connect
from tests.live.coordinated import CoordinatedSwarm, coordinated

pytestmark = pytest.mark.live

BLOCKS, HIDDEN = 6, 64
REVOKED_EVERYWHERE_S = 10.0
"""What docs/security.md promises while the coordinator is reached."""


@pytest.fixture(scope="module")
def swarm(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatedSwarm]:
    """One server that holds all blocks. Everything is logged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEOPETALS_LOG_LEVEL", "debug")
        with coordinated(llama, tmp_path_factory.mktemp("trust")) as running:
            running.add_server("--memory", "64MB", wait=True)
            yield running


@pytest.fixture(scope="module")
def server(swarm: CoordinatedSwarm) -> str:
    """The server's peer id."""
    found: str = swarm.wait_status(lambda status: [server["peer"] for server in status["servers"]], "a server")[0]
    return found


def authority(swarm: CoordinatedSwarm) -> Authority:
    """As `geopetals token --state` uses it."""
    return Authority.existing(swarm.folder / "state")


def tokens_of(model: Any) -> list[int]:
    found: list[int] = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)[0].tolist()
    return found


def outside(swarm: CoordinatedSwarm, scenario: Callable[[Network], Awaitable[None]]) -> None:
    """What somebody tries who knows where the swarm is."""

    async def main() -> None:
        peers = JoinToken.decode(swarm.tokens["client"]).peers
        network = await Network.start(NetworkConfig(initial_peers=peers))
        try:
            async with asyncio.timeout(60):
                await scenario(network)
        finally:
            await network.stop()

    asyncio.run(main())


async def refusal(work: Awaitable[Any]) -> str:
    with pytest.raises(NotAdmitted) as caught:
        await work
    return caught.value.reason


def test_a_stranger_is_refused_at_every_entry(swarm: CoordinatedSwarm, server: str, tmp_path: Path) -> None:
    token = JoinToken.decode(swarm.tokens["client"])
    cheat = Issuer(tmp_path, swarm=token.swarm, identity=token.identity)  # the right names under keys of their own
    cheat.clock.now = 0.0

    async def scenario(network: Network) -> None:
        member = cheat.member(peer_id=network.peer_id)
        hop = Hop(peer_id=server, start=0, end=BLOCKS, protocol=VERSION)
        hidden = torch.zeros(1, 2, HIDDEN)

        def ring(credential: bytes) -> Awaitable[Any]:
            opening = Opening(heartbeat_s=0.5, is_last=True, credential=credential)
            return HopSession.open(
                network.p2p,
                hop,
                token.swarm,
                opening,
                session_id=uuid.uuid4().hex,
                batch=1,
                hidden_size=HIDDEN,
                max_length=8,
                connect_timeout_s=30.0,
                alloc_timeout_s=0.0,
            )

        for credential, reason in (
            (b"", Refusal.MISSING),
            (b"let me in", Refusal.MALFORMED),
            (member.signed_ticket(expires_at=2e9), Refusal.UNKNOWN_KEY),
        ):
            options = PassOptions(connect_timeout_s=30.0, request_timeout_s=30.0, credential=credential)
            assert await refusal(ring(credential)) == reason
            assert await refusal(call_forward(network.p2p, hop, token.swarm, hidden, None, options)) == reason
            long = torch.zeros(1, 12_000, HIDDEN)  # in parts, on a stream
            assert await refusal(call_forward(network.p2p, hop, token.swarm, long, None, options)) == reason
            gradient = call_backward(network.p2p, hop, token.swarm, hidden, hidden, None, options)
            assert await refusal(gradient) == reason

    outside(swarm, scenario)


def test_a_stranger_writes_nothing_that_members_read(swarm: CoordinatedSwarm, server: str, connect: Connect) -> None:
    token = JoinToken.decode(swarm.tokens["client"])

    async def scenario(network: Network) -> None:
        info = ServerInfo(state=ServerState.ONLINE, throughput=1e9, start_block=0, end_block=BLOCKS)
        hashes = dict.fromkeys(range(BLOCKS), "a" * 64)
        await announce(network.node, token.swarm, info, identity=token.identity, block_hashes=hashes, num_blocks=BLOCKS)
        own = await read_servers(network.node, token.swarm, BLOCKS)  # the stranger's own node believes it
        assert network.peer_id in {record.peer_id for record in own}
        model = await asyncio.to_thread(connect, join=swarm.tokens["client"])
        assert [record.peer_id for record in model.swarm.servers] == [server]

    outside(swarm, scenario)


def test_to_know_the_address_is_not_enough(swarm: CoordinatedSwarm, connect: Connect) -> None:
    token = JoinToken.decode(swarm.tokens["client"])
    address_only = JoinToken(swarm=token.swarm, model=token.model, identity=token.identity, peers=token.peers)
    model = connect(join=address_only)
    with pytest.raises(NoChain):  # signed records look like nothing to who cannot check them
        tokens_of(model)


def test_commands_say_why_a_token_is_not_taken(swarm: CoordinatedSwarm) -> None:
    revoked = authority(swarm).create_token(Role.SERVER)
    authority(swarm).revoke(revoked.token_id)
    cases = {revoked.credential: "revoked", swarm.tokens["client"]: "is for a client, not for a server"}
    commands = {swarm.run("serve", "--join", token, "--memory", "64MB"): words for token, words in cases.items()}
    for command, words in commands.items():
        assert command.wait(timeout_s=120) == 2, command.printed()
        assert words in command.err.text


def test_a_revoked_client_is_out_everywhere_within_the_promised_time(swarm: CoordinatedSwarm, connect: Connect) -> None:
    token = authority(swarm).create_token(Role.CLIENT)
    model, other = connect(join=token), connect(join=swarm.tokens["client"])
    expected = tokens_of(model)
    assert tokens_of(other) == expected
    with model.inference_session(max_length=64) as session:
        hidden = torch.zeros(1, 1, HIDDEN)
        session.step(hidden)
        authority(swarm).revoke(token.token_id)

        def ended() -> GeoPetalsError | None:
            try:
                session.step(hidden)
            except GeoPetalsError as error:
                return error
            return None

        error = wait_for(ended, timeout_s=REVOKED_EVERYWHERE_S, what="the session's end")
    assert isinstance(error, NotAdmitted)
    assert error.reason == Refusal.REVOKED
    for revoked in (model, connect(join=token)):
        with pytest.raises(NotAdmitted, match="revoked"):
            tokens_of(revoked)
    assert tokens_of(other) == expected


def test_after_a_rotation_old_and_new_tokens_work_side_by_side(swarm: CoordinatedSwarm, connect: Connect) -> None:
    before = connect(join=swarm.tokens["client"])
    expected = tokens_of(before)
    assert swarm.run("token", "rotate", "--state", swarm.folder / "state").wait() == 0
    after = connect(join=authority(swarm).create_token(Role.CLIENT))
    wait_for(lambda: tokens_of(after) == expected, timeout_s=60, what="the server's trust in the new key")
    assert tokens_of(before) == expected


def test_no_secret_is_in_any_log(swarm: CoordinatedSwarm) -> None:
    """All that the processes above have logged, at debug level, and a client's command."""
    client = swarm.run("-vv", "generate", "--join", swarm.tokens["client"], "--max-new-tokens", "2", "hello")
    assert client.wait(timeout_s=120) == 0, client.printed()
    state = swarm.folder / "state"
    secrets = [*json.loads((state / "credentials.json").read_text())["keys"], *swarm.tokens.values()]
    secrets += [file.read_text().strip() for file in state.glob("*.token")]
    logs = [command.err.text for command in swarm.commands]
    assert sum(len(log) for log in logs) > 2000
    for secret in secrets:
        assert not [log for log in logs if secret in log or secret[-60:] in log]
    readable = [file.name for file in state.iterdir() if file.stat().st_mode & 0o077]
    assert state.stat().st_mode & 0o077 == 0
    assert "credentials.json" not in readable
    assert not [name for name in readable if name.endswith(".token")]


def test_members_that_run_outlive_the_retired_key(swarm: CoordinatedSwarm, connect: Connect) -> None:
    """The last of these tests: it ends the tokens of the others."""

    def renewed() -> int:
        return sum(command.err.text.count("certificate.renewed") for command in swarm.commands)

    before = renewed()
    assert swarm.run("token", "rotate", "--state", swarm.folder / "state").wait() == 0
    wait_for(lambda: renewed() > before, timeout_s=60, what="the server's certificate of the new key")
    assert swarm.run("token", "rotate", "--retire", "--state", swarm.folder / "state").wait() == 0
    newcomer = connect(join=authority(swarm).create_token(Role.CLIENT))
    assert len(tokens_of(newcomer)) == 3 + 4
    assert [server["state"] for server in swarm.status()["servers"]] == ["ready"]
