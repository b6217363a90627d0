"""Gradients through a chain of servers that are functions in this process, with failures where a test wants them."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from geopetals.client import chain_pass, pass_calls
from geopetals.client.autograd import through_swarm
from geopetals.client.config import ClientConfig
from geopetals.client.routing import Hop
from geopetals.client.swarm import SwarmClient
from geopetals.errors import NoChain, ServerFull, ServerGone, ServerRefused
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.records import ServerRecord
from geopetals.swarm.stack import ServerState

HIDDEN, BLOCKS, PREFIX = 8, 6, 2
MATRICES = torch.randn(BLOCKS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CONFIG = ClientConfig(max_retries=3, min_backoff=0.01, max_backoff=0.01)
Fault = Callable[[str, Hop], Exception | None]


def run_blocks(hidden: Tensor, prompts: Tensor | None, start: int, end: int) -> Tensor:
    """A row's tokens see each other, so that rows must not be mixed up; `prompts` are those of the span."""
    for block in range(start, end):
        if prompts is not None:
            prompt = prompts[block - start]
            hidden = torch.cat([hidden[:, : prompt.shape[1]] + prompt, hidden[:, prompt.shape[1] :]], dim=1)
        hidden = torch.tanh(hidden.cumsum(dim=1) @ MATRICES[block])
    return hidden


class FakeSwarm(SwarmClient):
    """Servers `name -> (start, end)`, the nearest first. `calls` tells what was asked: (method, name, start, end)."""

    def __init__(self, servers: dict[str, tuple[int, int]], config: ClientConfig = CONFIG) -> None:
        super().__init__(
            peers=(),
            swarm="toy",
            num_blocks=BLOCKS,
            hidden_size=HIDDEN,
            identity=cast(ModelIdentity, None),
            config=config,
        )
        self.calls: list[tuple[str, str, int, int]] = []
        self.tokens: list[int] = []
        self.fault: Fault = lambda method, hop: None
        self._servers = [
            ServerRecord(peer_id=name, start=start, end=end, state=ServerState.ONLINE, throughput=1.0)
            for name, (start, end) in servers.items()
        ]
        for number, name in enumerate(servers):
            self._distances.add(name, 0.1 * (number + 1))

    async def refresh_async(self) -> None:
        self._refreshed_at = time.monotonic()

    async def forward_on(self, hop: Hop, hidden: Tensor, prompts: Tensor | None) -> Tensor:
        await self._answer("forward", hop, hidden)
        return run_blocks(hidden, prompts, hop.start, hop.end)

    async def backward_on(
        self, hop: Hop, hidden: Tensor, grad_output: Tensor, prompts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        await self._answer("backward", hop, hidden)
        inputs = [tensor.detach().requires_grad_() for tensor in (hidden, prompts) if tensor is not None]
        output = run_blocks(inputs[0], inputs[1] if len(inputs) > 1 else None, hop.start, hop.end)
        grads = torch.autograd.grad(output, inputs, grad_output)
        return grads[0], grads[1] if len(grads) > 1 else None

    async def _answer(self, method: str, hop: Hop, hidden: Tensor) -> None:
        await asyncio.sleep(0)  # other requests get their turn
        self.calls.append((method, hop.peer_id, hop.start, hop.end))
        self.tokens.append(hidden.shape[0] * hidden.shape[1])
        error = self.fault(method, hop)
        if isinstance(error, ServerGone | ServerFull):
            self.avoid(hop.peer_id, error)
        if error is not None:
            raise error


@pytest.fixture
def make_swarm() -> Iterator[Callable[..., FakeSwarm]]:
    made: list[FakeSwarm] = []

    def make(servers: dict[str, tuple[int, int]], **options: Any) -> FakeSwarm:
        made.append(FakeSwarm(servers, **options))
        return made[-1]

    yield make
    for swarm in made:
        swarm.close()


def leaf(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * weights).sum(), inputs)


def assert_as_local(swarm: FakeSwarm, *, batch: int = 3, tokens: int = 5, prompt_rows: int | None = 1) -> None:
    """Output and gradients through the swarm equal those of the blocks run here."""
    inputs = [leaf(batch, tokens, HIDDEN, seed=1)]
    if prompt_rows is not None:
        inputs.append(leaf(BLOCKS, prompt_rows, PREFIX, HIDDEN, seed=2))
    prompts = inputs[1] if len(inputs) > 1 else None
    expected = run_blocks(inputs[0], prompts, 0, BLOCKS)
    found = through_swarm(swarm, inputs[0], prompts)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, *inputs), gradients(expected, *inputs))


@pytest.mark.parametrize("prompt_rows", [None, 1, 3])
@pytest.mark.parametrize("limit", [1024, 10, 1], ids=["one request", "rows 2+1", "row by row"])
def test_gradients_are_those_of_the_blocks_run_here(
    make_swarm: Callable[..., FakeSwarm], monkeypatch: pytest.MonkeyPatch, prompt_rows: int | None, limit: int
) -> None:
    """The second server is entered in the middle of its span."""
    monkeypatch.setattr(chain_pass, "MAX_TOKENS_PER_REQUEST", limit)
    swarm = make_swarm({"a": (0, 3), "b": (2, 6)})
    assert_as_local(swarm, prompt_rows=prompt_rows)
    assert set(swarm.calls) == {
        ("forward", "a", 0, 3),
        ("forward", "b", 3, 6),
        ("backward", "b", 3, 6),
        ("backward", "a", 0, 3),
    }
    assert max(swarm.tokens) <= max(limit, 5)  # one row is never split


def test_nothing_is_sent_back_where_no_gradient_is_needed(make_swarm: Callable[..., FakeSwarm]) -> None:
    swarm = make_swarm({"a": (0, 6)})
    hidden = leaf(1, 4, HIDDEN, seed=1)
    with torch.no_grad():
        assert through_swarm(swarm, hidden).grad_fn is None
    assert through_swarm(swarm, hidden.detach()).grad_fn is None
    assert [call[0] for call in swarm.calls] == ["forward", "forward"]


def test_prompts_alone_can_be_trained(make_swarm: Callable[..., FakeSwarm]) -> None:
    swarm = make_swarm({"a": (0, 2), "b": (2, 6)})
    hidden, prompts = leaf(2, 4, HIDDEN, seed=1).detach(), leaf(BLOCKS, 1, PREFIX, HIDDEN, seed=2)
    expected = gradients(run_blocks(hidden, prompts, 0, BLOCKS), prompts)
    torch.testing.assert_close(gradients(through_swarm(swarm, hidden, prompts), prompts), expected)


def test_a_graph_is_gone_after_its_backward_pass(make_swarm: Callable[..., FakeSwarm]) -> None:
    hidden = leaf(1, 4, HIDDEN, seed=1)
    output = through_swarm(make_swarm({"a": (0, 6)}), hidden).sum()
    output.backward(retain_graph=True)
    first = hidden.grad.clone() if hidden.grad is not None else None
    output.backward()
    assert first is not None
    torch.testing.assert_close(hidden.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


def fails(*where: tuple[str, str], error: Exception | None = None) -> Fault:
    """These servers fail in these methods, always."""
    return lambda method, hop: (error or ServerGone("gone")) if (method, hop.peer_id) in where else None


def test_another_chain_goes_on_where_a_forward_pass_failed(make_swarm: Callable[..., FakeSwarm]) -> None:
    swarm = make_swarm({"a": (0, 3), "b": (3, 6), "c": (2, 5), "d": (4, 6)})
    swarm.fault = fails(("forward", "b"))
    assert_as_local(swarm)
    assert swarm.calls == [
        ("forward", "a", 0, 3),
        ("forward", "b", 3, 6),
        ("forward", "c", 3, 5),
        ("forward", "d", 5, 6),
        ("backward", "d", 5, 6),
        ("backward", "c", 3, 5),
        ("backward", "a", 0, 3),
    ]


def test_a_backward_pass_repeats_only_what_the_failed_server_had_done(make_swarm: Callable[..., FakeSwarm]) -> None:
    """Of the other chain all but the last server are asked for their output."""
    swarm = make_swarm({"a": (0, 2), "b": (2, 5), "e": (5, 6), "c": (1, 4), "d": (3, 6)})
    swarm.fault = fails(("backward", "b"))
    assert_as_local(swarm)
    assert swarm.calls[3:] == [
        ("backward", "e", 5, 6),
        ("backward", "b", 2, 5),
        ("forward", "c", 2, 4),
        ("backward", "d", 4, 5),
        ("backward", "c", 2, 4),
        ("backward", "a", 0, 2),
    ]


def test_a_backward_pass_needs_no_servers_but_for_its_own_blocks(make_swarm: Callable[..., FakeSwarm]) -> None:
    """The last blocks are done when their only server, and then another one, are gone."""
    swarm = make_swarm({"a": (0, 3), "b": (3, 6), "c": (0, 3)})

    def fault(method: str, hop: Hop) -> Exception | None:
        if (method, hop.peer_id) != ("backward", "a"):
            return None
        swarm.avoid("b", ServerGone("gone"))
        return ServerGone("gone")

    swarm.fault = fault
    assert_as_local(swarm)
    assert swarm.calls[-2:] == [("backward", "a", 0, 3), ("backward", "c", 0, 3)]


@pytest.mark.parametrize("method", ["forward", "backward"])
def test_a_full_server_is_tried_again_only_so_often(make_swarm: Callable[..., FakeSwarm], method: str) -> None:
    swarm = make_swarm({"a": (0, 6)})
    swarm.fault = fails((method, "a"), error=ServerFull("full"))
    hidden = leaf(1, 4, HIDDEN, seed=1)
    with pytest.raises(ServerFull, match="full"):
        through_swarm(swarm, hidden).sum().backward()
    assert [call[0] for call in swarm.calls].count(method) == CONFIG.max_retries + 1


@pytest.mark.parametrize("method", ["forward", "backward"])
def test_blocks_that_nobody_serves_any_more_are_named(make_swarm: Callable[..., FakeSwarm], method: str) -> None:
    swarm = make_swarm({"a": (0, 3), "b": (2, 6)})
    swarm.fault = fails((method, "b"))
    with pytest.raises(NoChain, match="blocks 3:6 of 6 have no server"):
        through_swarm(swarm, leaf(1, 4, HIDDEN, seed=1)).sum().backward()


def test_a_swarm_without_a_chain_is_told_at_once(make_swarm: Callable[..., FakeSwarm]) -> None:
    swarm = make_swarm({"a": (0, 3)}, config=ClientConfig(max_retries=1000))
    with pytest.raises(NoChain, match="blocks 3:6"):
        through_swarm(swarm, leaf(1, 4, HIDDEN, seed=1))


@pytest.mark.parametrize("method", ["forward", "backward"])
def test_a_refused_request_is_not_repeated(make_swarm: Callable[..., FakeSwarm], method: str) -> None:
    swarm = make_swarm({"a": (0, 6), "b": (0, 6)})
    swarm.fault = fails((method, "a"), error=ServerRefused("no such blocks"))
    with pytest.raises(ServerRefused, match="no such blocks"):
        through_swarm(swarm, leaf(1, 4, HIDDEN, seed=1)).sum().backward()
    assert not [call for call in swarm.calls if call[1] == "b"]


def test_one_failed_request_of_many_ends_the_pass(
    make_swarm: Callable[..., FakeSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_pass, "MAX_TOKENS_PER_REQUEST", 4)
    swarm = make_swarm({"a": (0, 6)})
    swarm.fault = fails(("forward", "a"), error=ServerRefused("no such blocks"))
    with pytest.raises(ServerRefused):
        through_swarm(swarm, leaf(40, 4, HIDDEN, seed=1))
    assert len(swarm.calls) < 40


def test_half_precision_comes_back_as_it_was_given(make_swarm: Callable[..., FakeSwarm]) -> None:
    """Whatever format the servers answer in."""
    swarm = make_swarm({"a": (0, 6)})
    hidden = leaf(1, 4, HIDDEN, seed=1).detach().to(torch.bfloat16).requires_grad_()
    real = swarm.forward_on

    async def in_double(hop: Hop, hidden: Tensor, prompts: Tensor | None) -> Tensor:
        return await real(hop, hidden.double(), prompts)

    swarm.forward_on = in_double  # type: ignore[method-assign]
    assert through_swarm(swarm, hidden).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shapes", "is_answer"),
    [
        ([(3, 5, 8), (2, 1, 2, 8)], True),
        ([(3, 5, 8), (2, 3, 2, 8)], True),  # stock servers: one gradient for each row
        ([(3, 5, 8), (2, 2, 2, 8)], False),
        ([(3, 5, 8), (2, 1, 3, 8)], False),
        ([(3, 4, 8), (2, 1, 2, 8)], False),
        ([(3, 5, 8)], False),
        ([], False),
    ],
)
def test_gradients_have_the_shapes_of_what_was_sent(
    monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]], is_answer: bool
) -> None:
    async def answer(*_: Any) -> list[Tensor]:
        return [torch.ones(shape) for shape in shapes]

    monkeypatch.setattr(pass_calls, "_call", answer)
    hidden, prompts = torch.zeros(3, 5, 8), torch.zeros(2, 1, 2, 8)
    call = pass_calls.call_backward(
        cast(Any, None),
        Hop(peer_id="a", start=0, end=2),
        "toy",
        hidden,
        hidden,
        prompts,
        pass_calls.PassOptions(connect_timeout_s=1, request_timeout_s=1),
    )
    if not is_answer:
        with pytest.raises(ServerGone, match="other shapes"):
            asyncio.run(call)
        return
    grad_hidden, grad_prompts = asyncio.run(call)
    assert grad_prompts is not None
    assert (grad_hidden.shape, grad_prompts.shape) == (hidden.shape, prompts.shape)
    assert grad_prompts.unique().tolist() == [float(shapes[1][1])]
