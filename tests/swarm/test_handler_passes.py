"""Forward and backward passes, and what the server says of itself."""

import pytest
import torch
from hivemind.proto import runtime_pb2
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from torch import Tensor

from geopetals.errors import GeoPetalsError, ServerRefused
from geopetals.swarm import pass_service
from geopetals.swarm.stack import DUMMY, pack_args_kwargs
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import (
    WireError,
    deserialize,
    read_metadata,
    serialize,
    write_metadata,
)
from tests.swarm.handler_rig import HELD, HIDDEN, TOTAL, Server, close_to, play, randn, uids


def packed(*arguments: Tensor, uid: str = uids(HELD)) -> runtime_pb2.ExpertRequest:
    tensors, structure = pack_args_kwargs(*arguments)
    return runtime_pb2.ExpertRequest(
        uid=uid,
        tensors=[serialize(tensor) for tensor in tensors],
        metadata=write_metadata({"args_structure": structure}),
    )


def in_parts(request: runtime_pb2.ExpertRequest, size: int = 500) -> list[runtime_pb2.ExpertRequest]:
    return [
        runtime_pb2.ExpertRequest(uid=request.uid, metadata=request.metadata, tensors=[part])
        for tensor in request.tensors
        for part in split_for_streaming(tensor, size)
    ]


def joined(answers: list[runtime_pb2.ExpertResponse]) -> list[Tensor]:
    tensors: list[list[runtime_pb2.Tensor]] = []
    for answer in answers:
        for part in answer.tensors:
            if part.dtype:
                tensors.append([])
            tensors[-1].append(part)
    return [deserialize(combine_from_streaming(parts)) for parts in tensors]


async def ask(server: Server, name: str, request: runtime_pb2.ExpertRequest, *, stream: bool) -> list[Tensor]:
    if stream:
        return joined(await server.call_stream(f"{name}_stream", in_parts(request)))
    answer = await server.call(name, request)
    return [deserialize(tensor) for tensor in answer.tensors]


@pytest.mark.parametrize("stream", [False, True])
def test_forward_and_backward_are_those_of_the_stage(stage: Stage, stream: bool) -> None:
    hidden, gradient = randn(2, 7), randn(2, 7, seed=1)
    prompts = torch.randn(3, 2, 4, HIDDEN, generator=torch.Generator().manual_seed(2))
    leaf = hidden.clone().requires_grad_()
    expected = stage.run(leaf, HELD.start, HELD.stop)
    expected.backward(gradient)

    async def scenario(server: Server) -> None:
        (output,) = await ask(server, "rpc_forward", packed(hidden, DUMMY), stream=stream)
        assert close_to(output, expected.detach())
        (grad,) = await ask(server, "rpc_backward", packed(hidden, gradient, DUMMY), stream=stream)
        assert leaf.grad is not None
        assert close_to(grad, leaf.grad)
        both = await ask(server, "rpc_backward", packed(hidden, gradient, prompts), stream=stream)
        assert [tensor.shape for tensor in both] == [hidden.shape, prompts.shape]

    play(stage, scenario)


WRONG_REQUESTS = {
    "nothing": runtime_pb2.ExpertRequest(),
    "no tensors": runtime_pb2.ExpertRequest(uid=uids(HELD)),
    "another swarm": packed(randn(1, 2), randn(1, 2), uid="other.2"),
    "another block": packed(randn(1, 2), randn(1, 2), uid=uids(range(6))),
    "another hidden size": packed(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)),
    "a structure without tensors": runtime_pb2.ExpertRequest(
        uid=uids(HELD), metadata=write_metadata({"args_structure": [["x"], {}]})
    ),
    "no metadata but noise": runtime_pb2.ExpertRequest(uid=uids(HELD), metadata=b"\xc1"),
    "a list for metadata": runtime_pb2.ExpertRequest(uid=uids(HELD), metadata=b"\x90"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["rpc_forward", "rpc_backward"])
@pytest.mark.parametrize("request_", WRONG_REQUESTS.values(), ids=WRONG_REQUESTS.keys())
def test_wrong_calls_are_refused(stage: Stage, name: str, request_: runtime_pb2.ExpertRequest, stream: bool) -> None:
    async def scenario(server: Server) -> None:
        with pytest.raises((WireError, GeoPetalsError)):
            await ask(server, name, request_, stream=stream)

    play(stage, scenario)


def test_parts_for_different_blocks_are_refused(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        parts = in_parts(packed(randn(1, 7), DUMMY))
        parts[1].uid = uids(range(3, 4))
        with pytest.raises(ServerRefused, match="differ"):
            await server.call_stream("rpc_forward_stream", parts)

    play(stage, scenario)


def test_a_stream_over_the_limit_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_service, "MAX_FRAME_BYTES", 1000)

    async def scenario(server: Server) -> None:
        with pytest.raises(ServerRefused, match="over the limit"):
            await server.call_stream("rpc_forward_stream", in_parts(packed(randn(1, 7), DUMMY)))

    play(stage, scenario)


def test_the_description_is_what_petals_clients_read(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        answer = await server.call("rpc_info", runtime_pb2.ExpertUID(uid=uids(HELD)))
        info = read_metadata(answer.serialized_info)
        inputs, keywords = info["inference_schema"]
        assert len(inputs) == 3
        assert keywords == {}
        assert all(isinstance(part, BatchTensorDescriptor) for part in inputs)
        assert inputs[0].dtype == torch.float32
        assert len(info["forward_schema"][0]) == 1
        assert len(info["outputs_schema"]) == 1
        assert not info["keyword_names"]
        assert info["cache_tokens_available"] == TOTAL
        assert info["version"].startswith("2.2.0")
        bare = read_metadata((await server.call("rpc_info", runtime_pb2.ExpertUID())).serialized_info)
        assert bare["dht_client_mode"] is False
        with pytest.raises(WireError):
            await server.call("rpc_info", runtime_pb2.ExpertUID(uid="other.1"))

    play(stage, scenario)
