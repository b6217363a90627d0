"""A simulation of every single decode step, as the measure for the fluid: a closed set of sessions that never end."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geopetals.problem import Contention, Floats


@dataclass(frozen=True)
class Client:
    """A session that decodes for ever: its servers in order, blocks on each, and delays of its links per token."""

    servers: Sequence[int]
    blocks: Sequence[int]
    links_s: float


def mean_step_s(clients: Sequence[Client], contention: Contention, *, batched: bool, steps: int) -> Floats:
    """(clients,): the mean time per token, after as many steps for each to settle."""
    rng = np.random.default_rng(0)
    queues: list[list[int]] = [[] for _ in contention.floor_s]
    working = [False] * len(queues)
    events: list[tuple[float, int, str, int, tuple[int, ...]]] = []
    place, done, since = [0] * len(clients), [0] * len(clients), [0.0] * len(clients)
    mean_s, left, sequence = np.full(len(clients), np.nan), len(clients), 0

    def push(at_s: float, kind: str, which: int, served: tuple[int, ...] = ()) -> None:
        nonlocal sequence
        sequence += 1
        heapq.heappush(events, (at_s, sequence, kind, which, served))

    def begin(server: int, now: float) -> None:
        if working[server] or not queues[server]:
            return
        count = len(queues[server]) if batched else 1
        served, queues[server] = tuple(queues[server][:count]), queues[server][count:]
        blocks = np.mean([clients[c].blocks[place[c]] for c in served])
        working[server] = True
        step_s = blocks * (contention.floor_s[server] + contention.session_s[server] * count)
        push(now + float(step_s), "done", server, served)

    def travel(client: int, now: float) -> None:
        # A tenth of jitter, or sessions fall into step as they never do on the Internet.
        delay_s = clients[client].links_s / len(clients[client].servers) * rng.uniform(0.9, 1.1)
        push(now + delay_s, "come", client)

    for client in range(len(clients)):
        travel(client, float(rng.uniform(0, 0.1)))
    while left:
        now, _, kind, which, served = heapq.heappop(events)
        if kind == "come":
            server = clients[which].servers[place[which]]
            queues[server].append(which)
            begin(server, now)
            continue
        working[which] = False
        for client in served:
            place[client] += 1
            if place[client] == len(clients[client].servers):
                place[client], done[client] = 0, done[client] + 1
                if done[client] == steps:
                    since[client] = now
                if done[client] == 2 * steps:
                    mean_s[client], left = (now - since[client]) / steps, left - 1
            travel(client, now)
        begin(which, now)
    return mean_s
