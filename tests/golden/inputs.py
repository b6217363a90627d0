"""A golden case's inputs as the values that the package works on: seconds, bytes, from 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geopetals.placement.petals import PetalsServers
from geopetals.plan import Chain, Hop, Placement
from geopetals.problem import Problem
from geopetals.routing.petals import PingTimes

MS = 1e-3
GB = 1e9
_MIG_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One case."""

    problem: Problem
    """Without the authors' limit on MIG servers."""
    capped: Problem
    """With it, where the case has it."""
    raw: dict[str, Any]

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "Inputs":
        mig = np.array(raw.get("server_type", [])) == "MIG"
        limits = np.where(mig, _MIG_BLOCKS, raw["L"]) if raw.get("mig_cap4") else np.zeros(0, dtype=np.int64)
        return cls(problem=_problem(raw, np.zeros(0, dtype=np.int64)), capped=_problem(raw, limits), raw=raw)

    def seconds(self, name: str) -> float:
        return float(self.raw.get(name, 0.0)) * MS

    @property
    def petals(self) -> PetalsServers:
        return PetalsServers(
            hidden_size=self.raw["d_model"],
            kv_groups=self.raw["num_key_value_groups"],
            forward_rps=np.array(self.raw["throughput_forward_rps"]),
            network_rps=np.array(self.raw["throughput_network_rps"]),
        )

    @property
    def pings(self) -> PingTimes:
        clients = self.raw["n_clients"]
        rtt_s = np.array(self.raw["rtt_raw_ms"]) * MS
        return PingTimes(client_s=rtt_s[:clients, clients:], between_s=rtt_s[clients:, clients:])

    @property
    def join_order(self) -> list[int]:
        return [server - 1 for server in self.raw["join_order"]]


def _problem(raw: dict[str, Any], limits: np.ndarray[Any, Any]) -> Problem:
    clients = raw["n_clients"]
    return Problem(
        num_blocks=raw["L"],
        block_bytes=raw["s_m_gb"] * GB,
        kv_bytes=raw["s_c_gb"] * GB,
        output_tokens=raw["l_max"],
        memory_bytes=np.array(raw["memory_gb"]) * GB,
        max_blocks=limits,
        decode_block_s=np.array(raw["tau_ms"]) * MS,
        prefill_block_s=np.array(raw.get("tau_input_ms", raw["tau_ms"])) * MS,
        relay_decode_s=np.array(raw["rtt_ms"]) * MS,
        relay_prefill_s=np.array(raw.get("rtt_input_ms", raw["rtt_ms"])) * MS,
        demand_per_s=np.full(clients, raw.get("lambda_per_ms", 0.0) / MS / clients),
    )


def placement_of(answer: dict[str, Any], num_blocks: int) -> Placement:
    """From 1-based a and m."""
    starts = np.array(answer["a"]) - 1
    held = np.array(answer["m"])
    return Placement(
        num_blocks=num_blocks, starts=np.where(held > 0, starts, 0), ends=np.where(held > 0, starts + held, 0)
    )


def chain_along(placement: Placement, servers: Sequence[int]) -> Chain:
    """The chain through these servers, each to its end."""
    hops, block = [], 0
    for server in servers:
        end = int(placement.ends[server])
        hops.append(Hop(server, block, end))
        block = end
    return Chain(tuple(hops))
