"""What servers say of their attention cache."""

from collections.abc import Sequence
from typing import Any

from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from geopetals.swarm.local import LocalServer
from geopetals.swarm.wire import HANDLER, read_metadata


def free_cache(model: Any, servers: Sequence[LocalServer]) -> list[int]:
    """Of each server, in block-tokens, asked by the model's own client."""

    async def ask() -> list[int]:
        answers = []
        for server in servers:
            answer = await model.swarm.network.p2p.call_protobuf_handler(
                PeerID.from_base58(server.peer_id),
                f"{HANDLER}.rpc_info",
                runtime_pb2.ExpertUID(),
                runtime_pb2.ExpertInfo,
            )
            answers.append(int(read_metadata(answer.serialized_info)["cache_tokens_available"]))
        return answers

    free: list[int] = model.swarm.run(ask())
    return free
