"""The swarms of the paper's simulations (arXiv 2512.21884): BLOOM-176B on slices of A100s (slow) and whole ones (fast).

| value                          | slow     | fast      | from |
| ------------------------------ | -------- | --------- | ---- |
| tau, ms per block and token    | 16.2488  | 3.2197    | the authors' measurements |
| tau^I, ms per block and prompt | 208.4367 | 34.476    | the same, 20 tokens |
| memory, GB, networks           | 9.1      | 86.13     | the authors' simulator |
| memory, GB, clustered          | 9.1      | 79.14     | the same |
| most blocks                    | 4        | any       | the same |
| stock's tokens/s, one block    | 2757.7   | 20829.4   | the same |
| stock's tokens/s, network      | 3138.1   | 3020.4    | the same |
| of tau, for each session, ms   | 0.84     | 0.12      | assumed, a slice is a seventh of an A100 |

A hop adds to its round trip, per token and for the prompt, 100 and 81.098 ms on the networks and 50 and 55 ms in the
clustered setting. By push, each server adds as much once: nothing is won by assuming cheaper software.
"""

from dataclasses import dataclass, replace

import numpy as np

from geopetals.placement.petals import PetalsServers
from geopetals.problem import Contention, Floats, OneWayDelays, Problem, PushDelays
from geopetals.routing.petals import PingTimes
from geopetals.simulation import World
from geopetals.simulation.world import StockFacts

NUM_BLOCKS = 70
HIDDEN = 14336
PROMPT_TOKENS = 20
_BLOCK_BYTES = 1.3233976672e9
_TOKEN_BYTES = 57344.0
"""Attention cache of one token in one block."""
_MOST_SLOW = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What differs between the paper's two kinds of settings."""

    hop_s: float
    prompt_hop_s: float
    initial_s: float
    """Added to every request, and to the time from which the design load follows."""
    fast_bytes: float
    slow_bytes: float = 9.1e9


NETWORK = Site(hop_s=0.1, prompt_hop_s=0.081098, initial_s=0.07, fast_bytes=86.13e9)
CLUSTERED = Site(hop_s=0.05, prompt_hop_s=0.055, initial_s=0.1, fast_bytes=79.138427734375e9)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Swarm:
    """One client and its servers, as the paper prices them."""

    world: World
    site: Site

    def uncapped(self) -> Problem:
        """Without the limit of blocks on slow servers, which the authors' estimate of the load does not have."""
        problem = self.world.problem
        return replace(problem, max_blocks=np.full(problem.num_servers, problem.num_blocks))

    def with_contention(self) -> "Swarm":
        """Servers slow down with their sessions; alone, a session takes as long as without."""
        problem = self.world.problem
        fast = problem.decode_block_s < 0.01
        session_s = np.where(fast, 0.12e-3, 0.84e-3)
        contention = Contention(floor_s=problem.decode_block_s - session_s, session_s=session_s)
        return self._with(replace(problem, contention=contention))

    def _with(self, problem: Problem) -> "Swarm":
        return replace(self, world=replace(self.world, problem=problem))


def swarm_of(rtt_s: Floats, fast: "np.ndarray[tuple[int], np.dtype[np.bool_]]", *, site: Site, **load: float) -> Swarm:
    """rtt_s: (1 + J, 1 + J), the client first; fast: (J,); load: rate_per_s and output_tokens."""
    rate_per_s, output_tokens = load["rate_per_s"], int(load["output_tokens"])
    to_server_s = rtt_s[:1, 1:]
    problem = Problem(
        num_blocks=NUM_BLOCKS,
        block_bytes=_BLOCK_BYTES,
        kv_bytes=_TOKEN_BYTES * (PROMPT_TOKENS + output_tokens),
        output_tokens=output_tokens,
        memory_bytes=np.where(fast, site.fast_bytes, site.slow_bytes),
        max_blocks=np.where(fast, NUM_BLOCKS, _MOST_SLOW),
        decode_block_s=np.where(fast, 3.2197e-3, 16.2488e-3),
        prefill_block_s=np.where(fast, 34.476e-3, 208.4367e-3),
        relay_decode_s=to_server_s + site.hop_s,
        relay_prefill_s=to_server_s + site.prompt_hop_s,
        demand_per_s=np.array([rate_per_s]),
        push=PushDelays(decode=_one_way(rtt_s, site.hop_s), prefill=_one_way(rtt_s, site.prompt_hop_s)),
    )
    servers = PetalsServers(
        hidden_size=HIDDEN,
        forward_rps=np.where(fast, 20829.38146541331, 2757.7243405599083),
        network_rps=np.where(fast, 3020.3700586885343, 3138.1039624670034),
    )
    pings = PingTimes(client_s=to_server_s, between_s=rtt_s[1:, 1:])
    return Swarm(world=World(problem=problem, stock=StockFacts(servers=servers, pings=pings)), site=site)


def _one_way(rtt_s: Floats, hop_s: float) -> OneWayDelays:
    half_s = rtt_s / 2
    return OneWayDelays(
        from_client_s=half_s[:1, 1:] + hop_s, between_s=half_s[1:, 1:] + hop_s, to_client_s=half_s[1:, :1]
    )
