"""How long things take: a hop, a chain, a session; relay and push; with several sessions on a server; and what fits.

| paper     | here                                                                                               |
| --------- | -------------------------------------------------------------------------------------------------- |
| k_j       | hop.blocks                                                                                         |
| c_j(k)    | session_costs(...): tI_cj + (l_out - 1) t_cj + (tauI_j + (l_out - 1) tau_j) k                      |
| t_cj + tau_j k | decode_costs(...): one decode step of a hop                                                   |
| d_ij      | HopCosts.push: one-way delays of a chain whose servers send straight to the next                   |

Relay: every hop is a round trip of the client. Push: client to first server, server to server, last server to client.
Both add the computing time of each hop, which is proportional to its blocks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from geopetals.errors import UnsupportedInput
from geopetals.plan import Chain, Placement
from geopetals.problem import Floats, Ints, OneWayDelays, Problem

Objective = Literal["relay", "push"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HopCosts:
    """Seconds that hops cost: delays by relay_s or push, the other is None, and block_s for each block computed."""

    block_s: Floats
    """(J,)"""
    relay_s: Floats | None = None
    """(C, J)"""
    push: OneWayDelays | None = None

    @property
    def num_clients(self) -> int:
        delays = self.relay_s if self.push is None else self.push.from_client_s
        return 0 if delays is None else int(delays.shape[0])

    def chain_s(self, client: int, chain: Chain) -> float:
        """What the chain costs a session of this client that does not wait."""
        servers = chain.servers
        compute = sum([float(self.block_s[hop.server]) * (hop.end - hop.start) for hop in chain])
        if self.push is None:
            return compute + float(self._relayed(client)[list(servers)].sum())
        between = sum(float(self.push.between_s[here, there]) for here, there in pairwise(servers))
        first, last = self.push.from_client_s[client, servers[0]], self.push.to_client_s[servers[-1], client]
        return compute + float(first) + between + float(last)

    def _relayed(self, client: int) -> Floats:
        if self.relay_s is None:
            raise UnsupportedInput("These costs have neither relay nor push delays: give one of them.")
        delays: Floats = self.relay_s[client]
        return delays


def weighted_costs(problem: Problem, *, prefills: float, decodes: float, objective: Objective = "relay") -> HopCosts:
    """The cost of that many passes of the prompt and that many decode steps, for one session without others."""
    block_s = _weighted(problem.prefill_block_s, prefills, problem.decode_block_s, decodes)
    if objective == "relay":
        relay_s = _weighted(problem.relay_prefill_s, prefills, problem.relay_decode_s, decodes)
        return HopCosts(block_s=block_s, relay_s=relay_s)
    if problem.push is None:
        raise UnsupportedInput("The delays between servers are not known: give them, or plan for relay.")
    prompt, token = problem.push.prefill, problem.push.decode
    delays = OneWayDelays(
        from_client_s=_weighted(prompt.from_client_s, prefills, token.from_client_s, decodes),
        between_s=_weighted(prompt.between_s, prefills, token.between_s, decodes),
        to_client_s=_weighted(prompt.to_client_s, prefills, token.to_client_s, decodes),
    )
    return HopCosts(block_s=block_s, push=delays)


def decode_costs(problem: Problem, objective: Objective = "relay") -> HopCosts:
    """One decode step."""
    return weighted_costs(problem, prefills=0, decodes=1, objective=objective)


def prefill_costs(problem: Problem, objective: Objective = "relay") -> HopCosts:
    """The prompt's pass, which gives the first token."""
    return weighted_costs(problem, prefills=1, decodes=0, objective=objective)


def session_costs(problem: Problem, objective: Objective = "relay") -> HopCosts:
    """A whole session of output_tokens: what routing minimises."""
    return weighted_costs(problem, prefills=1, decodes=problem.output_tokens - 1, objective=objective)


def session_s(
    problem: Problem,
    client: int,
    chain: Chain,
    *,
    objective: Objective = "relay",
    wait_s: float = 0.0,
    initial_s: float = 0.0,
) -> float:
    """From arrival to the last token: waiting, initial delay, first token, output_tokens - 1 decode steps."""
    return wait_s + initial_s + session_costs(problem, objective).chain_s(client, chain)


def chunked_prefill_s(problem: Problem, client: int, chain: Chain, *, chunks: int) -> float:
    """Time to the first token by push when the prompt goes in equal chunks, so that links and servers work at once.

    What a link needs for the prompt beyond a single token is its transfer; transfers and computations are the stages
    of a pipeline, latencies add up once.
    """
    if problem.push is None or chunks < 1:
        raise UnsupportedInput("Chunked prefill needs the delays between servers and at least one chunk: give both.")
    latency_s = _link_delays(problem.push.decode, client, chain.servers)
    transfer_s = np.maximum(_link_delays(problem.push.prefill, client, chain.servers) - latency_s, 0)
    compute_s = [float(problem.prefill_block_s[hop.server]) * hop.blocks for hop in chain]
    stages = np.concatenate([transfer_s, compute_s])
    return float(latency_s.sum() + stages.sum() / chunks + stages.max() * (chunks - 1) / chunks)


def step_block_s(problem: Problem, sessions: ArrayLike) -> Floats:
    """(J,): time per block of one decode step that each server makes for `sessions` at once (a number, or (J,))."""
    if problem.contention is None:
        return problem.decode_block_s
    batch = np.maximum(np.asarray(sessions, dtype=np.float64), 1.0)
    return np.asarray(problem.contention.floor_s + problem.contention.session_s * batch)


def cache_slots_used(chains: Iterable[Chain], num_servers: int) -> Ints:
    """(J,): session-blocks whose caches these sessions hold on each server."""
    used = np.zeros(num_servers, dtype=np.int64)
    for chain in chains:
        for hop in chain:
            used[hop.server] += hop.blocks
    return used


def memory_used_bytes(problem: Problem, placement: Placement, chains: Iterable[Chain]) -> Floats:
    """(J,): s_m m_j and s_c for every block that a session uses on j."""
    used = cache_slots_used(chains, problem.num_servers)
    return np.asarray(problem.block_bytes * placement.held + problem.kv_bytes * used)


def sessions_per_server(problem: Problem, placement: Placement) -> Ints:
    """f_j, (J,): sessions whose caches fit when each uses all blocks of the server; 0 for a server without blocks."""
    held = placement.held
    return np.where(held > 0, problem.slots(held) // np.maximum(held, 1), 0)


def _weighted(prompt: Floats, prefills: float, token: Floats, decodes: float) -> Floats:
    # A weight of 0 leaves its term out: 0 times an infinite delay is undefined.
    if not prefills:
        return np.asarray(decodes * token)
    return np.asarray(prefills * prompt + decodes * token) if decodes else np.asarray(prefills * prompt)


def _link_delays(delays: OneWayDelays, client: int, servers: tuple[int, ...]) -> Floats:
    between = [float(delays.between_s[here, there]) for here, there in pairwise(servers)]
    first, last = delays.from_client_s[client, servers[0]], delays.to_client_s[servers[-1], client]
    return np.array([float(first), *between, float(last)])
