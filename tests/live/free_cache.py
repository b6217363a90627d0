"""What servers say of their attention cache."""

from collections.abc import Sequence
from typing import Any

from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from geopetals.swarm.local import LocalServer
from geopetals.swarm.ring_messages import KEY
from geopetals.swarm.wire import HANDLER, read_metadata
from tests.live.commands import wait_for


def free_cache(model: Any, servers: Sequence[LocalServer]) -> list[int]:
    """Of each server, in block-tokens, asked by the model's own client.

    A client does not wait for its servers at the end of a session: what is free now and then is wait_all_free()'s.
    """
    return [int(cache["free"]) for cache in _caches(model, servers)]


def wait_all_free(model: Any, servers: Sequence[LocalServer], *, timeout_s: float) -> None:
    """Until no session holds or awaits cache on any of the servers."""
    seen: list[dict[str, Any]] = []

    def all_free() -> bool:
        seen[:] = _caches(model, servers)
        return all(cache["free"] == cache["total"] and not cache["running"] + cache["waiting"] for cache in seen)

    wait_for(all_free, timeout_s=timeout_s, what=lambda: f"all attention cache free, but there is {seen}")


def _caches(model: Any, servers: Sequence[LocalServer]) -> list[dict[str, Any]]:
    async def ask() -> list[dict[str, Any]]:
        answers = []
        for server in servers:
            answer = await model.swarm.network.p2p.call_protobuf_handler(
                PeerID.from_base58(server.peer_id),
                f"{HANDLER}.rpc_info",
                runtime_pb2.ExpertUID(),
                runtime_pb2.ExpertInfo,
            )
            answers.append(read_metadata(answer.serialized_info)[KEY]["cache"])
        return answers

    caches: list[dict[str, Any]] = model.swarm.run(ask())
    return caches
