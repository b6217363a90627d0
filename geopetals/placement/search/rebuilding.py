"""Large swarms: a few pods at a time are taken apart, and made anew from their servers and those that none uses."""

import math
import random

import numpy as np

from geopetals.placement.search.carrying import Carrier
from geopetals.placement.search.effort import Effort
from geopetals.placement.search.priced import Pod, PodMaker, placed
from geopetals.placement.search.spans import Spans

STEPS = 128
"""Of annealing, that making a few pods anew counts as."""
UNTIL = 0.4
"""Share of the effort after which pods are no longer made anew."""
PATIENCE = 60
"""Nor are they after so many times in a row without a new best."""
FIRST, LAST = 0.003, 6e-5
"""Temperatures as shares of what a pod costs."""
ROOMIER = (0.9, 1.0, 1.1, 1.3)
NOISE = (0.1, 0.3, 0.8)
ORDERS = 12


def priced_pods(maker: PodMaker) -> list[Pod] | None:
    """The cheapest of a few ways to price; None if there is none with room for all sessions."""
    made = [maker.make(maker.instance.sessions, maker.movable, roomier=roomier) for roomier in ROOMIER]
    return min((pods for pods in made if pods), key=_cost_s, default=None)


def rebuilt(maker: PodMaker, origin: list[Pod], *, rng: random.Random, effort: Effort) -> list[Pod]:
    """The cheapest pods met, origin included."""
    now, best = origin, origin
    begin, idle = effort.spent(), 0
    while (spent := effort.spent()) < UNTIL and idle < PATIENCE:
        temperature_s = FIRST * (LAST / FIRST) ** ((spent - begin) / (UNTIL - begin)) * _cost_s(now) / len(now)
        chosen = set(rng.sample(range(len(now)), min(len(now), rng.choice((1, 2, 2, 3, 3, 4)))))
        kept = [pod for number, pod in enumerate(now) if number not in chosen]
        taken = [now[number] for number in sorted(chosen)]
        used = [server for pod in kept for server, _ in pod.shares]
        sessions = np.asarray(np.sum([pod.sessions for pod in taken], axis=0))
        servers = np.setdiff1d(maker.movable, used)
        made = maker.make(sessions, servers, roomier=rng.choice(ROOMIER), noise=rng.choice(NOISE), rng=rng)
        effort.count(STEPS)
        idle += 1
        if made and _cost_s(made) - _cost_s(taken) < -temperature_s * math.log(1.0 - rng.random()):
            now = kept + made
            if _cost_s(now) < _cost_s(best):
                best, idle = now, 0
    return best


def laid_out(carrier: Carrier, pods: list[Pod], *, rng: random.Random, orders: int = ORDERS) -> Spans:
    """The order of servers in their pods that routing does best with, of some drawn at random."""
    found = []
    for number in range(orders):
        placement = placed(carrier.instance, pods, rng if number else None)
        starts, ends = placement.starts.tolist(), placement.ends.tolist()
        found.append(Spans(starts, ends, carrier.cost_s(starts, ends)))
    return min(found, key=lambda spans: spans.cost_s)


def _cost_s(pods: list[Pod]) -> float:
    return sum(pod.cost_s for pod in pods)
