"""A scenario's cluster at the size of a tiny model, so that memory and times mean what they mean in the large one.

A tiny block is as many bytes of weights for the cache bytes of a session as a block of the scenario's model. So memory
in proportion holds as many blocks, and beside them as many sessions, by any rule that only counts those two. Stock
PETALS' rule also counts what training needs, which does not shrink in proportion: it is applied to the scenario's
cluster, and stock servers are told the number of blocks and the cache that it gives. Of a model with more blocks than
this machine can compute, `merge` blocks become one.

Bandwidths are left out: messages of a tiny model are too small for them to mean anything.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from geopetals.cluster import Cluster, DecodeTime, PrefillTime, ServerSpec, to_problem
from geopetals.cluster.to_problem import decode_time, prefill_time
from geopetals.placement.petals import CACHE_TOKENS, GROUPED_CACHE_TOKENS, blocks_to_hold
from geopetals.planning.stock import StockSwarm
from geopetals.problem import Floats, Ints, Problem
from geopetals.swarm.emulation import DeviceSpec
from live.scenario import LiveScenario

HIDDEN, HEADS, KV_HEADS = 32, 4, 1
BYTES = 4
"""Of a value, in float32."""
_HEAD_DIM = HIDDEN // HEADS
KV_BYTES_PER_TOKEN = 2 * KV_HEADS * _HEAD_DIM * BYTES


@dataclass(frozen=True)
class TinyModel:
    """A Llama of which a block has about `block_bytes`."""

    num_blocks: int
    intermediate: int

    @property
    def block_bytes(self) -> int:
        attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * _HEAD_DIM
        return BYTES * (attention + 3 * HIDDEN * self.intermediate + 2 * HIDDEN)

    @classmethod
    def for_block_bytes(cls, num_blocks: int, block_bytes: float) -> "TinyModel":
        attention = cls(num_blocks, 0).block_bytes
        return cls(num_blocks, max(round((block_bytes - attention) / (3 * HIDDEN * BYTES)), 1))


@dataclass(frozen=True)
class Live:
    """A scenario and what stands for it on this machine."""

    scenario: LiveScenario

    @cached_property
    def merged(self) -> Cluster:
        """The scenario's, with fewer and larger blocks."""
        given, merge = self.scenario.cluster, self.scenario.merge
        model = replace(
            given.model,
            num_blocks=given.model.num_blocks // merge,
            block_bytes=given.model.block_bytes * merge,
            kv_bytes_per_token=given.model.kv_bytes_per_token * merge,
        )
        return replace(given, model=model, servers=tuple(self._merged_server(server) for server in given.servers))

    @cached_property
    def large(self) -> Problem:
        """Of `merged`."""
        return to_problem(self.merged)

    @cached_property
    def model(self) -> TinyModel:
        tiny_kv = KV_BYTES_PER_TOKEN * self.scenario.session_tokens
        return TinyModel.for_block_bytes(self.large.num_blocks, tiny_kv * self.large.block_bytes / self.large.kv_bytes)

    @cached_property
    def cluster(self) -> Cluster:
        """Tiny model and memory, sessions as they are made; the block times are those of the large model."""
        given, scenario = self.merged, self.scenario
        model = replace(
            given.model,
            name="tiny",
            hidden_size=HIDDEN,
            block_bytes=self.model.block_bytes,
            kv_bytes_per_token=KV_BYTES_PER_TOKEN,
            hidden_bytes_per_token=HIDDEN * BYTES,
            active_bytes=None,
            head_groups=1,
        )
        work = replace(given.workload, prompt_tokens=scenario.prompt_tokens, output_tokens=scenario.output_tokens)
        clients = tuple(replace(client, bandwidth_bit_per_s=None) for client in given.clients)
        servers = tuple(self._server(server) for server in given.servers)
        return replace(given, model=model, workload=work, clients=clients, servers=servers)

    def devices(self) -> dict[str, DeviceSpec]:
        """Of each server, slowed down by the scenario's dilation."""
        found = {}
        for server in self.cluster.servers:
            assert server.decode_block is not None
            assert server.prefill_block is not None
            found[str(server.id)] = DeviceSpec(
                weights_s=server.decode_block.weights_s,
                session_s=server.decode_block.session_s,
                fixed_s=server.prefill_block.fixed_s,
                token_s=server.prefill_block.token_s,
                memory_bytes=server.memory_bytes,
                dilation=self.scenario.dilation,
            )
        return found

    def with_demand(self, rate_per_s: float) -> Cluster:
        """The tiny cluster, with so many sessions arriving."""
        if self.cluster.workload.arrivals_per_s is not None:
            return replace(self.cluster, workload=replace(self.cluster.workload, arrivals_per_s=rate_per_s))
        factor = rate_per_s / sum(self.cluster.demand_per_s())
        clients = tuple(
            replace(client, requests_per_s=(client.requests_per_s or 0.0) * factor) for client in self.cluster.clients
        )
        return replace(self.cluster, clients=clients)

    @cached_property
    def stock_blocks(self) -> Ints:
        """(J,): by PETALS' rule for the memory of a server, which knows nothing of merged blocks."""
        problem = to_problem(self.scenario.cluster)
        held = blocks_to_hold(problem, StockSwarm(self.scenario.cluster, problem).announced)
        return np.asarray(held // self.scenario.merge)

    @cached_property
    def stock_cache_tokens(self) -> int:
        """Of each block, so that as many sessions fit as in the scenario."""
        groups = self.scenario.cluster.model.head_groups
        usual = CACHE_TOKENS if groups <= 1 else GROUPED_CACHE_TOKENS
        sessions = usual // self.scenario.cluster.workload.session_tokens
        return max(sessions, 1) * self.scenario.session_tokens

    def stock_slots(self, held: Ints) -> Ints:
        """(J,): session-blocks for which stock servers have cache that hold so many blocks."""
        return np.asarray(held * (self.stock_cache_tokens // self.scenario.session_tokens))

    def cache_tokens(self, server: int, blocks: int) -> int:
        """Of each block, where a server uses all the memory that `blocks` blocks leave."""
        spec = self.cluster.servers[server]
        left = spec.memory_bytes - blocks * self.model.block_bytes
        return int(left // (blocks * KV_BYTES_PER_TOKEN))

    def problem(
        self, cluster: Cluster | None = None, *, rtts: Floats | None = None, overhead_s: float = 0.0
    ) -> Problem:
        """Of the tiny cluster; software takes `overhead_s` per hop."""
        return to_problem(with_software(cluster or self.cluster, overhead_s), rtts=rtts)

    def _merged_server(self, server: ServerSpec) -> ServerSpec:
        """With the times that it has, or that are estimated from its type of GPU."""
        given, merge = self.scenario.cluster, self.scenario.merge
        prefill_s = prefill_time(given, server).for_tokens(given.workload.prompt_tokens)
        decode = decode_time(given, server)
        return replace(
            server,
            gpu=None,
            decode_block=DecodeTime(weights_s=merge * decode.weights_s, session_s=merge * decode.session_s),
            prefill_block=PrefillTime(fixed_s=merge * prefill_s),
            max_blocks=None if server.max_blocks is None else max(server.max_blocks // merge, 1),
        )

    def _server(self, server: ServerSpec) -> ServerSpec:
        memory = int(server.memory_bytes * self.model.block_bytes / self.large.block_bytes)
        return replace(server, memory_bytes=max(memory, 1), overhead_s=0.0, bandwidth_bit_per_s=None)


def with_software(cluster: Cluster, overhead_s: float) -> Cluster:
    """With so much software per hop."""
    return replace(cluster, servers=tuple(replace(server, overhead_s=overhead_s) for server in cluster.servers))
