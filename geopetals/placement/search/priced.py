"""Pods that leave each server to the pod where it is worth the most. Relay only.

What a server is worth follows from one price, that of a block of a session: with room for n sessions it earns
n (price x blocks - cost), and the price is the lowest at which the servers, each at its best n, have room for all
sessions in all blocks. A pod pays for the worth of its servers, so that those which could do more are not spent on a
few sessions, and pods are of unlike size, as servers are.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geopetals.bound import cheapest_knapsack
from geopetals.placement.cg_bp import blocks_to_hold
from geopetals.placement.search.candidates import client_delays, pinned_spans
from geopetals.placement.search.instance import Instance
from geopetals.plan import Placement
from geopetals.problem import Floats, Ints

GRID_RATIO = 1.15
HALVINGS = 24
NEAR_SERVERS = 40
"""A pod is chosen among that many servers, those whose blocks are cheapest."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pod:
    """One chain, and the sessions that take it."""

    shares: tuple[tuple[int, int], ...]
    """(server, blocks)."""
    sessions: Ints
    """(C,)"""
    cost_s: float
    """Of all of them."""


class PodMaker:
    """Makes pods of the servers whose blocks may be chosen."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.movable = np.array(instance.movable, dtype=np.int64)
        self._delays_s = client_delays(instance)
        self._block_s = instance.costs.block_s
        loads = _loads(int(instance.sessions.sum()))
        self._loads = np.array(loads)
        self._fitting = np.array([blocks_to_hold(instance.problem, load) for load in loads])
        """(N,) sessions; (N, J) blocks of each server with room for so many."""

    def make(
        self, sessions: Ints, servers: Ints, *, roomier: float, noise: float = 0.0, rng: random.Random | None = None
    ) -> list[Pod] | None:
        """Pods of these servers for `sessions` (C,); None if they do not all find room.

        roomier: the price is as if there were so many times the sessions. noise: servers' worth varies by so much.
        """
        left, pods = sessions.copy(), list[Pod]()
        while left.any():
            pod = self._cheapest(left, servers, roomier, noise, rng)
            if pod is None:
                return None
            pods.append(pod)
            left -= pod.sessions
            servers = np.setdiff1d(servers, [server for server, _ in pod.shares])
        return pods

    def _cheapest(
        self, left: Ints, servers: Ints, roomier: float, noise: float, rng: random.Random | None
    ) -> Pod | None:
        """For each session it carries, the worth of its servers included."""
        fitting = self._fitting[:, servers]
        some = fitting.any(axis=1) & (self._loads <= left.sum())
        if not some.any():
            return None
        loads, fitting = self._loads[some], fitting[some]
        worth_s = self._worth_s(left, servers, loads, fitting, roomier)
        doubts = np.ones(loads.size)
        if noise and rng is not None:
            worth_s = worth_s * _factors(rng, servers.size, noise)
            doubts = _factors(rng, loads.size, noise / 10)
        groups = np.array([self._group(left, int(load)) for load in loads])
        block_s = self._block_s[servers]
        hops_s = worth_s / loads[:, None] + (groups / groups.sum(axis=1)[:, None]) @ self._delays_s[:, servers]
        order, least_s = _cheapest_first(hops_s, block_s, fitting, self.instance.num_blocks)
        best_s, best = np.inf, None
        for at in np.argsort(least_s * doubts, kind="stable").tolist():
            if least_s[at] * doubts[at] >= best_s:
                break
            near = order[at, :NEAR_SERVERS]
            found = cheapest_knapsack(hops_s[at, near], block_s[near], fitting[at, near], self.instance.num_blocks)
            if found.decode_s * doubts[at] < best_s:
                best_s = found.decode_s * doubts[at]
                best = (tuple((int(servers[near[place]]), blocks) for place, blocks in found.blocks_of), groups[at])
        return None if best is None else self._pod(*best)

    def _pod(self, shares: tuple[tuple[int, int], ...], sessions: Ints) -> Pod:
        used, blocks = np.array(shares).T
        each_s = self._delays_s[:, used].sum(axis=1) + float(self._block_s[used] @ blocks)
        return Pod(shares=shares, sessions=sessions, cost_s=float(sessions @ each_s))

    def _worth_s(self, left: Ints, servers: Ints, loads: Ints, fitting: Ints, roomier: float) -> Floats:
        """(servers,)"""
        delay_s = left / left.sum() @ self._delays_s[:, servers]
        room = loads[:, None] * fitting
        cost_s = loads[:, None] * np.where(fitting > 0, delay_s, 0.0) + room * self._block_s[servers]
        needed = int(left.sum()) * self.instance.num_blocks * roomier
        low_s, high_s = self.instance.penalty_s * 1e-6, self.instance.penalty_s
        for _ in range(HALVINGS):
            price_s = float((low_s * high_s) ** 0.5)
            earned_s = price_s * room - cost_s
            best = earned_s.argmax(axis=0), np.arange(servers.size)
            if room[best][earned_s[best] > 0].sum() >= needed:
                high_s = price_s
            else:
                low_s = price_s
        return np.asarray(np.maximum((high_s * room - cost_s).max(axis=0), 0.0))

    def _group(self, left: Ints, size: int) -> Ints:
        """(C,): that many sessions, of the client with the most and those most like it."""
        leader = int(np.argmax(left))
        nearest = np.argsort(np.abs(self._delays_s - self._delays_s[leader]).sum(axis=1), kind="stable")
        before = np.cumsum(left[nearest]) - left[nearest]
        taken = np.zeros_like(left)
        taken[nearest] = np.clip(size - before, 0, left[nearest])
        return taken


def placed(instance: Instance, pods: Sequence[Pod], rng: random.Random | None = None) -> Placement:
    """Pods laid end to end; with `rng`, each in any order, which costs the same and decides where chains may mix."""
    starts, ends = pinned_spans(instance.problem)
    for pod in pods:
        block, shares = 0, list(pod.shares)
        if rng is not None:
            rng.shuffle(shares)
        for server, blocks in shares:
            starts[server], ends[server] = block, block + blocks
            block += blocks
    return Placement(num_blocks=instance.num_blocks, starts=starts, ends=ends)


def _loads(sessions: int) -> list[int]:
    loads, load = {1, sessions}, 1.0
    while load < sessions:
        loads.add(round(load))
        load *= GRID_RATIO
    return sorted(loads)


def _factors(rng: random.Random, count: int, noise: float) -> Floats:
    return 1 + noise * (np.array([rng.random() for _ in range(count)]) - 0.5)


def _cheapest_first(hops_s: Floats, block_s: Floats, fitting: Ints, num_blocks: int) -> tuple[Ints, Floats]:
    """For each load the servers, (N, J), those with the cheapest blocks first, and what a chain costs at least, (N,).

    That is the cost of the first servers that hold the model, the last of them in part; infinite if all do not.
    """
    rate_s = np.where(fitting > 0, hops_s / np.maximum(fitting, 1) + block_s, np.inf)
    order = np.argsort(rate_s, axis=1, kind="stable")
    blocks = np.take_along_axis(fitting, order, axis=1)
    used = np.clip(num_blocks - (np.cumsum(blocks, axis=1) - blocks), 0, blocks)
    paid_s = used * np.where(used > 0, np.take_along_axis(rate_s, order, axis=1), 0.0)
    return order, np.where(used.sum(axis=1) == num_blocks, paid_s.sum(axis=1), np.inf)
