"""PETALS' own client code against our servers: its sessions, its push, its reading of the DHT."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from transformers import PreTrainedModel

import geopetals.swarm.stack  # noqa: F401 - makes petals importable
from geopetals.join_token import JoinToken
from geopetals.swarm.local import LocalServer, LocalSwarm
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.wire import HANDLER
from tests.live.test_parity import assert_close, hidden_after_blocks, prompts

# isort: split
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.utils.serializer import MSGPackSerializer
from petals.client.inference_session import _ServerInferenceSession  # noqa: TID251 - the stock client is the subject
from petals.client.remote_forward_backward import run_remote_backward, run_remote_forward  # noqa: TID251
from petals.data_structures import CHAIN_DELIMITER, ServerState  # noqa: TID251
from petals.server.handler import TransformerConnectionHandler  # noqa: TID251
from petals.utils.dht import _get_remote_module_infos, compute_spans  # noqa: TID251
from petals.utils.misc import DUMMY, DUMMY_INT64  # noqa: TID251
from petals.utils.packaging import pack_args_kwargs  # noqa: TID251

pytestmark = pytest.mark.live

Result = TypeVar("Result")
PREFIX = "llama"


class Stock(NamedTuple):
    """What a stock client has: a peer of its own, and what one server said of itself."""

    network: Network
    infos: dict[str, dict[str, Any]]

    async def session(self, server: LocalServer, start: int, end: int, **metadata: Any) -> "StockSession":
        uid = CHAIN_DELIMITER.join(f"{PREFIX}.{block}" for block in range(start, end))
        span = SimpleNamespace(peer_id=PeerID.from_base58(server.peer_id), start=start, end=end)
        session = await _ServerInferenceSession.create(
            SimpleNamespace(connect_timeout=10, request_timeout=20, use_server_to_server=True),
            self.network.p2p,
            span,
            uid,
            self.infos[server.peer_id],
            **metadata,
        )
        return StockSession(session)

    def stub(self, server: LocalServer) -> Any:
        return TransformerConnectionHandler.get_stub(self.network.p2p, PeerID.from_base58(server.peer_id))


class StockSession:
    """PETALS' session on one server. Its own step() blocks another loop; this is the same on ours."""

    def __init__(self, session: Any) -> None:
        self.inner = session

    async def send(self, hidden: torch.Tensor, step_id: str, **metadata: Any) -> None:
        """Put a step into the stream as `_ServerInferenceSession.step` words it."""
        tensors, structure = pack_args_kwargs(hidden, DUMMY, DUMMY_INT64)
        first = {} if self.inner.stepped else self.inner.session_metadata
        more = {"session_id": self.inner.session_id, "step_id": step_id, **first, **metadata}
        request = runtime_pb2.ExpertRequest(
            uid=self.inner.uid,
            tensors=[serialize_torch_tensor(tensor) for tensor in tensors],
            metadata=MSGPackSerializer.dumps({**more, "args_structure": structure}),
        )
        await self.inner._inputs_queue.put(request)
        self.inner.stepped = True

    async def receive(self, *, timeout_s: float = 20) -> torch.Tensor:
        async with asyncio.timeout(timeout_s):
            response = await anext(self.inner._outputs_stream)
        return deserialize_torch_tensor(response.tensors[0])

    async def step(self, hidden: torch.Tensor, step_id: str, **metadata: Any) -> torch.Tensor:
        await self.send(hidden, step_id, **metadata)
        return await self.receive()

    async def close(self) -> None:
        """PETALS' end of a session; it takes a server that closes first for a failure."""
        await self.inner._aclose_stream()
        self.forget()

    def forget(self) -> None:
        """For a session that failed: PETALS' own destructor would talk to the server from another loop."""
        self.inner._outputs_stream = None


def as_stock(swarm: LocalSwarm, work: Callable[[Stock], Awaitable[Result]]) -> Result:
    """Run `work` with a stock client in the swarm."""

    async def run() -> Result:
        peers = JoinToken.decode(swarm.token).peers
        network = await Network.start(NetworkConfig(initial_peers=peers, client_only=True))
        try:
            infos = {}
            for server in swarm.servers:
                stub = TransformerConnectionHandler.get_stub(network.p2p, PeerID.from_base58(server.peer_id))
                answer = await stub.rpc_info(runtime_pb2.ExpertUID(uid=f"{PREFIX}.{server.start}"))
                infos[server.peer_id] = MSGPackSerializer.loads(answer.serialized_info)
            return await work(Stock(network, infos))
        finally:
            await network.stop()

    return asyncio.run(run())


@pytest.fixture
def embedded(local: Any) -> torch.Tensor:
    with torch.no_grad():
        embedded: torch.Tensor = local.get_input_embeddings()(prompts(2, 9))
    return embedded


@pytest.fixture
def expected(local: PreTrainedModel) -> torch.Tensor:
    return hidden_after_blocks(local, prompts(2, 9))


def test_handler_has_the_name_that_stock_clients_call() -> None:
    assert TransformerConnectionHandler.__name__ == HANDLER


def test_info_is_what_a_stock_client_needs(two_stages: LocalSwarm) -> None:
    async def work(stock: Stock) -> dict[str, dict[str, Any]]:
        return stock.infos

    for info in as_stock(two_stages, work).values():
        assert info["version"] == "2.2.0.post1"
        assert info["dht_client_mode"] is False
        assert info["cache_tokens_available"] == 3 * 16384 or info["cache_tokens_available"] == 4 * 16384
        schemas, keywords = info["inference_schema"]
        assert (len(schemas), keywords, info["keyword_names"]) == (3, {}, ())
        assert schemas[0].compression == runtime_pb2.CompressionType.NONE
        assert len(info["forward_schema"][0]) == 1  # PETALS adds the prompts itself


def test_a_session_over_both_servers(two_stages: LocalSwarm, embedded: torch.Tensor, expected: torch.Tensor) -> None:
    """The first step carries data and the session's metadata at once; prefill in pieces; the second server at 3."""
    first, second = two_stages.servers

    async def work(stock: Stock) -> torch.Tensor:
        one = await stock.session(first, 0, 3, max_length=16)
        two = await stock.session(second, 3, 6, max_length=16)
        outputs = []
        for number, piece in enumerate(embedded.split([4, 4, 1], dim=1)):
            between = await one.step(piece, f"step{number}")
            outputs.append(await two.step(between, f"step{number}"))
        await two.close()
        await one.close()
        return torch.cat(outputs, dim=1)

    assert_close(as_stock(two_stages, work), expected)


def test_a_push_is_computed_once(two_stages: LocalSwarm, embedded: torch.Tensor, expected: torch.Tensor) -> None:
    """With next_servers the first server pushes: the second answers before the client has sent it anything.

    The client's own message of the same step comes later and changes nothing, as the next step shows.
    """
    first, second = two_stages.servers

    async def work(stock: Stock) -> torch.Tensor:
        one = await stock.session(first, 0, 3, max_length=16)
        two = await stock.session(second, 3, 6, max_length=16)
        prefill, *tokens = embedded.split([5, 1, 1, 1, 1], dim=1)
        outputs = [await two.step(await one.step(prefill, "prefill"), "prefill")]
        chain = [(second.peer_id, two.inner.session_id, 3, 6)]
        for number, token in enumerate(tokens):
            step_id = f"step{number}"
            between = await one.step(token, step_id, next_servers=chain)
            outputs.append(await two.receive())  # only the push can have brought it there
            await two.send(between, step_id)
        await two.inner._inputs_queue.put(runtime_pb2.ExpertRequest())
        with pytest.raises(StopAsyncIteration):  # the session ends without another answer
            await two.receive()
        two.forget()
        await one.close()
        return torch.cat(outputs, dim=1)

    assert_close(as_stock(two_stages, work), expected)


def test_forward_and_backward(two_stages: LocalSwarm, local: Any, embedded: torch.Tensor) -> None:
    """PETALS' own functions for it, over the first server's blocks; gradients as autograd has them."""
    server = two_stages.servers[0]
    uid = CHAIN_DELIMITER.join(f"{PREFIX}.{block}" for block in range(3))
    grad = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(3))

    async def work(stock: Stock) -> tuple[torch.Tensor, torch.Tensor]:
        config = SimpleNamespace(request_timeout=20, connect_timeout=10)
        _, structure = pack_args_kwargs(embedded, DUMMY)
        options = {"config": config, "metadata": MSGPackSerializer.dumps({"args_structure": structure})}
        info, stub = stock.infos[server.peer_id], stock.stub(server)
        (output,) = await run_remote_forward(uid, stub, info, embedded, DUMMY, **options)
        _, structure = pack_args_kwargs(embedded, grad, DUMMY)
        options["metadata"] = MSGPackSerializer.dumps({"args_structure": structure})
        gradients = await run_remote_backward(uid, stub, info, embedded, grad, DUMMY, **options)
        return output, gradients[0]

    output, gradient = as_stock(two_stages, work)
    kept: list[torch.Tensor] = []
    hook = local.model.layers[3].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    inputs = embedded.clone().requires_grad_()
    local.model(inputs_embeds=inputs)
    hook.remove()
    kept[0].backward(grad)
    assert inputs.grad is not None
    assert_close(output, kept[0].detach())
    assert_close(gradient, inputs.grad, relative=2e-5)


def test_records_in_the_dht(three_stages: LocalSwarm) -> None:
    """PETALS' reader finds every server with its span, and takes no notice of what we added."""

    async def work(stock: Stock) -> Any:
        dht = SimpleNamespace(num_workers=None)
        uids = [f"{PREFIX}.{block}" for block in range(6)]
        return await _get_remote_module_infos(
            dht, stock.network.node, uids, active_adapter=None, expiration_time=time.time(), latest=False
        )

    infos = as_stock(three_stages, work)
    spans = compute_spans(infos, min_state=ServerState.ONLINE)
    found = {peer_id.to_base58(): (span.start, span.end) for peer_id, span in spans.items()}
    assert found == {server.peer_id: (server.start, server.end) for server in three_stages.servers}
    for span in spans.values():
        assert span.server_info.throughput > 0
        assert span.server_info.torch_dtype == "float32"
        assert span.server_info.version == "2.2.0.post1"


def test_mistakes_are_answered_as_stock_clients_expect(two_stages: LocalSwarm, embedded: torch.Tensor) -> None:
    """An error on the stream, not a silent end; and the server goes on."""
    server = two_stages.servers[0]

    async def wrong(stock: Stock, start: int, end: int, hidden: torch.Tensor, **metadata: Any) -> str:
        session = await stock.session(server, start, end, **metadata)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - hivemind's own type
            await session.step(hidden, "step")
        session.forget()
        return str(caught.value)

    async def work(stock: Stock) -> None:
        assert "0:3" in await wrong(stock, 2, 5, embedded, max_length=16)
        assert "max_length" in await wrong(stock, 0, 3, embedded, max_length=10**9)
        assert "64" in await wrong(stock, 0, 3, embedded[..., :32], max_length=16)
        assert await wrong(stock, 0, 3, embedded, max_length=4)
        session = await stock.session(server, 0, 3, max_length=16)
        assert (await session.step(embedded, "step")).shape == embedded.shape
        await session.close()

    as_stock(two_stages, work)
