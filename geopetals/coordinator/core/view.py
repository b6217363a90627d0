"""The live swarm as the planner knows swarms: a Cluster for plans, a World for routing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from geopetals.cluster import (
    ClientId,
    ClientSpec,
    Cluster,
    ModelSpec,
    Network,
    PlaceId,
    RttMatrix,
    ServerSpec,
    Workload,
    to_problem,
)
from geopetals.coordinator.core.settings import ModelFacts
from geopetals.problem import Floats, Problem
from geopetals.simulation.world import Tokens, World

ANYONE = "anyone"
"""The client that stands for those of which nothing is known."""
_LONGEST_RTT_S = 60.0
_HERE = PlaceId("here")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What sessions look like, and how many come from which client each second."""

    prompt_tokens: int
    output_tokens: int
    arrivals_per_s: float
    shares: Mapping[str, float]


def plan_cluster(
    model: ModelFacts, work: Work, servers: Sequence[ServerSpec], rtts: Floats, *, name: str | None = None
) -> Cluster:
    """The cluster on which `geopetals plan` gives the coordinator's plan. rtts: as Links.matrix, for plan_clients."""
    clients = plan_clients(work)
    names = [str(server.id) for server in servers]
    pairs = tuple(
        (PlaceId(member), PlaceId(names[column]), float(min(rtts[row, column], _LONGEST_RTT_S)))
        for row, member in enumerate([*clients, *names])
        for column in range(max(row + 1 - len(clients), 0), len(names))
    )
    # By way of the nearest server: nothing is sent between clients, but a cluster has all pairs.
    pairs += tuple(
        (PlaceId(one), PlaceId(clients[column]), float(min((rtts[row] + rtts[column]).min(), _LONGEST_RTT_S)))
        for row, one in enumerate(clients)
        for column in range(row + 1, len(clients))
    )
    return Cluster(
        name=name,
        model=_model(model),
        workload=_workload(model, work),
        servers=tuple(servers),
        clients=tuple(
            ClientSpec(id=ClientId(client), requests_per_s=work.arrivals_per_s * work.shares.get(client, 1.0))
            for client in clients
        ),
        network=Network(rtt=RttMatrix(rtts=pairs)),
    )


def plan_clients(work: Work) -> list[str]:
    """Those whose demand is planned for."""
    return list(work.shares) or [ANYONE]


def problem_of(
    model: ModelFacts, work: Work, servers: Sequence[ServerSpec], clients: Sequence[str], rtts: Floats
) -> Problem:
    """Of any servers, also too few for the model, and any number of clients that demand the same."""
    return to_problem(_bare_cluster(model, work, servers, clients), rtts=rtts, whole=False)


def routing_world(
    model: ModelFacts,
    work: Work,
    servers: Sequence[ServerSpec],
    clients: Sequence[str],
    rtts: Floats,
    *,
    page_tokens: int,
) -> World:
    """The world for routing: its unit of cache is a page, and memory is whatever servers hold already."""
    cluster = _bare_cluster(model, work, servers, clients)
    problem = _as_held(to_problem(cluster, rtts=rtts, whole=False), float(model.kv_bytes_per_token * page_tokens))
    sizes = cluster.workload
    other_prompt = 1 if sizes.prompt_tokens > 1 else 2
    shorter = replace(cluster, workload=replace(cluster.workload, prompt_tokens=other_prompt))
    tokens = Tokens(
        prompt=sizes.prompt_tokens,
        output=sizes.output_tokens,
        other_prompt=other_prompt,
        other=to_problem(shorter, rtts=rtts, whole=False),
    )
    return World(problem=problem, tokens=tokens)


def _as_held(problem: Problem, kv_bytes: float) -> Problem:
    """Servers may hold what they hold: their limits were looked at when that was decided."""
    enough = np.maximum(problem.memory_bytes, problem.num_blocks * problem.block_bytes)
    return replace(
        problem,
        kv_bytes=kv_bytes,
        memory_bytes=enough,
        max_blocks=np.full(problem.num_servers, problem.num_blocks),
        pinned=(),
    )


def _bare_cluster(model: ModelFacts, work: Work, servers: Sequence[ServerSpec], clients: Sequence[str]) -> Cluster:
    """Without distances, which are given apart: thousands of clients would need millions of entries."""
    return Cluster(
        model=_model(model),
        workload=_workload(model, work),
        servers=tuple(replace(server, place=_HERE) for server in servers),
        clients=tuple(
            ClientSpec(id=ClientId(client), place=_HERE, requests_per_s=work.arrivals_per_s / len(clients))
            for client in clients
        ),
        network=Network(rtt=RttMatrix(rtts=((_HERE, _HERE, 0.0),))),
    )


def _model(model: ModelFacts) -> ModelSpec:
    return ModelSpec(
        name=model.name,
        num_blocks=model.num_blocks,
        hidden_size=model.hidden_size,
        block_bytes=model.block_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
        hidden_bytes_per_token=model.hidden_bytes_per_token,
        head_groups=model.head_groups,
        max_tokens=model.max_tokens,
    )


def _workload(model: ModelFacts, work: Work) -> Workload:
    """No longer than the model allows."""
    prompt, output = work.prompt_tokens, work.output_tokens
    if model.max_tokens is not None and prompt + output > model.max_tokens:
        output = max(min(output, model.max_tokens - 1), 1)
        prompt = max(model.max_tokens - output, 1)
    return Workload(prompt_tokens=prompt, output_tokens=output)
