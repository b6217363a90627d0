"""From a Cluster to the Problem that placement and routing solve.

| quantity        | from                                                                                             |
| --------------- | ------------------------------------------------------------------------------------------------ |
| relay_decode_s  | RTT + overhead of the server + one hidden state there and back over the slower of both lines     |
| relay_prefill_s | the same with the hidden states of the whole prompt                                              |
| push            | RTT / 2 + overhead of the receiving server (none at the client) + hidden states over the line    |
| kv_bytes        | attention cache of prompt and answer in one block                                                |
"""

from collections.abc import Sequence

import numpy as np

from geopetals.cluster.cluster import Cluster
from geopetals.cluster.delays import rtt_s
from geopetals.cluster.errors import Called, ClusterError
from geopetals.cluster.hardware import GPUS, LAUNCH_S
from geopetals.cluster.machines import ClientSpec, DecodeTime, PrefillTime, ServerSpec
from geopetals.errors import MemoryShortage
from geopetals.problem import Contention, Floats, OneWayDelays, Problem, PushDelays
from geopetals.units import in_units

_BITS = 8


def to_problem(
    cluster: Cluster, *, contention: bool = True, overhead: bool = True, rtts: Floats | None = None, whole: bool = True
) -> Problem:
    """Servers and clients by their index in the cluster.

    contention: sessions at once slow each other's decode steps. overhead: software takes its time, too.
    rtts: instead of the network's, as `rtt_s` gives them, or their columns of servers alone. whole: the servers have to
    be enough for the model.
    Raises ClusterError for RTTs that are not known and clients who cannot reach enough servers, MemoryShortage for a
    model that is larger than all memory.
    """
    model, work = cluster.model, cluster.workload
    decode = [decode_time(cluster, server) for server in cluster.servers]
    prefill = [prefill_time(cluster, server) for server in cluster.servers]
    rtts = rtt_s(cluster) if rtts is None else rtts
    token, prompt = (_delays(cluster, rtts, count, overhead=overhead) for count in (1, work.prompt_tokens))
    problem = Problem(
        num_blocks=model.num_blocks,
        block_bytes=float(model.block_bytes),
        kv_bytes=float(model.kv_bytes_per_token * work.session_tokens),
        output_tokens=work.output_tokens,
        memory_bytes=np.array([server.memory_bytes for server in cluster.servers], dtype=np.float64),
        max_blocks=np.array([server.max_blocks or model.num_blocks for server in cluster.servers]),
        decode_block_s=np.array([time.for_sessions(1) for time in decode]),
        prefill_block_s=np.array([time.for_tokens(work.prompt_tokens) for time in prefill]),
        relay_decode_s=token.from_client_s + token.to_client_s.T,
        relay_prefill_s=prompt.from_client_s + prompt.to_client_s.T,
        push=PushDelays(decode=token, prefill=prompt),
        demand_per_s=np.array(cluster.demand_per_s()),
        pinned=tuple(server.blocks for server in cluster.servers),
        contention=Contention(
            floor_s=np.array([time.weights_s for time in decode]),
            session_s=np.array([time.session_s for time in decode]),
        )
        if contention
        else None,
    )
    if whole:
        _check_memory(cluster, problem)
        _check_paths(cluster, problem)
    return problem


def decode_time(cluster: Cluster, server: ServerSpec) -> DecodeTime:
    """As given, else an estimate from the type of GPU: see hardware.py."""
    if server.decode_block is not None:
        return server.decode_block
    gpu, model, work = GPUS[server.gpu or ""], cluster.model, cluster.workload
    mean_cache_bytes = model.kv_bytes_per_token * (work.prompt_tokens + work.output_tokens / 2)
    return DecodeTime(
        weights_s=LAUNCH_S + gpu.read_s(model.active_bytes or model.block_bytes),
        session_s=gpu.read_s(mean_cache_bytes) + gpu.token_s(model.active_parameters or 0),
    )


def prefill_time(cluster: Cluster, server: ServerSpec) -> PrefillTime:
    """As given, else an estimate from the type of GPU: see hardware.py."""
    if server.prefill_block is not None:
        return server.prefill_block
    gpu, model = GPUS[server.gpu or ""], cluster.model
    return PrefillTime(
        fixed_s=LAUNCH_S + gpu.read_s(model.block_bytes), token_s=gpu.token_s(model.active_parameters or 0)
    )


def _delays(cluster: Cluster, rtts: Floats, tokens: int, *, overhead: bool) -> OneWayDelays:
    """For the hidden states of that many tokens, with the receiver's overhead if wanted."""
    hosts: Sequence[ClientSpec | ServerSpec] = (*cluster.clients, *cluster.servers)
    lines = np.array([host.bandwidth_bit_per_s or np.inf for host in hosts])
    bits = _BITS * cluster.model.hidden_bytes_per_token * tokens
    software_s = np.array([getattr(host, "overhead_s", 0.0) if overhead else 0.0 for host in hosts])
    clients = len(cluster.clients)
    is_whole = rtts.shape[1] == len(hosts)
    to_server_s, to_client_s = (rtts[:, clients:], rtts[clients:, :clients]) if is_whole else (rtts, rtts[:clients].T)
    to_server_s = to_server_s / 2 + bits / np.minimum(lines[:, None], lines[None, clients:]) + software_s[clients:]
    to_client_s = to_client_s / 2 + bits / np.minimum(lines[clients:, None], lines[:clients]) + software_s[:clients]
    return OneWayDelays(from_client_s=to_server_s[:clients], between_s=to_server_s[clients:], to_client_s=to_client_s)


def _check_memory(cluster: Cluster, problem: Problem) -> None:
    """Every block has to fit somewhere, with the attention cache of one session."""
    held = most_blocks(problem)
    if held.sum() < problem.num_blocks:
        missing = problem.num_blocks - int(held.sum())
        short = missing * (problem.block_bytes + problem.kv_bytes)
        raise MemoryShortage(
            f"servers: {cluster.model.name} has {problem.num_blocks} blocks of {in_units(problem.block_bytes)}, all "
            f"servers together hold {int(held.sum())}: add servers with {in_units(short)} for the other {missing}, or "
            "choose smaller weights."
        )


def most_blocks(problem: Problem) -> Floats:
    """(J,): blocks that each server could hold and still serve one session through all of them."""
    return np.minimum(np.floor(problem.memory_bytes / (problem.block_bytes + problem.kv_bytes)), problem.max_blocks)


def _check_paths(cluster: Cluster, problem: Problem) -> None:
    held = most_blocks(problem)
    for client, delays in zip(cluster.clients, problem.relay_decode_s, strict=True):
        reached = np.isfinite(delays)
        if held[reached].sum() < problem.num_blocks:
            raise ClusterError(
                ("clients", Called(client.id)),
                f"no chain of servers leads through the model: it reaches {int(reached.sum())} of {len(reached)}, "
                f"which hold {int(held[reached].sum())} of {problem.num_blocks} blocks; connect it to more of them.",
            )
