"""Placements to start from: CG-BP for a grid of design loads, and pods, groups of servers that share no chain.

A placement made for fewer sessions than there will be gives each server more blocks, so chains are shorter while there
is room. Pods go further: the best single chain for a few sessions, then the best one of the servers that are left.
"""

from collections.abc import Iterator

import numpy as np

from geopetals.bound import cheapest_knapsack
from geopetals.errors import MemoryShortage
from geopetals.placement.cg_bp import blocks_to_hold, cg_bp
from geopetals.placement.search.instance import Instance
from geopetals.plan import Placement
from geopetals.problem import Floats, Ints, Problem

GRID_RATIO = 1.35


def design_loads(sessions: int) -> list[int]:
    """From all sessions down to 1, each about GRID_RATIO less."""
    loads, load = [], float(sessions)
    while load > 1:
        loads.append(round(load))
        load /= GRID_RATIO
    return sorted({*loads, 1}, reverse=True)


def cg_bp_placements(instance: Instance, sessions: int) -> list[Placement]:
    """CG-BP for that design load; for push also with what a hop costs there. Empty if it cannot be placed."""
    problem = instance.problem
    delays: list[Floats | None] = [None, *(_push_delays(problem) if instance.objective == "push" else [])]
    found = []
    for delay_s in delays:
        try:
            found.append(cg_bp(problem, sessions, delay_s=delay_s).placement)
        except MemoryShortage:
            continue
    return found


def pods(instance: Instance, sessions: int) -> Placement:
    """Groups of servers end to end, each for that many sessions, until all sessions have one or no server is left."""
    problem = instance.problem
    fitting = blocks_to_hold(problem, sessions)
    unused = np.array([pin is None for pin in problem.pinned])
    starts, ends = pinned_spans(problem)
    for weights in _groups(instance, sessions):
        hop_s = _hop_s(instance, weights)
        found = cheapest_knapsack(hop_s, instance.costs.block_s, np.where(unused, fitting, 0), problem.num_blocks)
        if not np.isfinite(found.decode_s):
            break
        block = 0
        for server, blocks in _in_order(instance, found.blocks_of, weights):
            starts[server], ends[server] = block, block + blocks
            unused[server] = False
            block += blocks
    return Placement(num_blocks=problem.num_blocks, starts=starts, ends=ends)


def pinned_spans(problem: Problem) -> tuple[Ints, Ints]:
    """Starts and ends, (J,), with no blocks for servers that are not pinned."""
    starts = np.array([0 if pin is None else pin[0] for pin in problem.pinned])
    ends = np.array([0 if pin is None else pin[1] for pin in problem.pinned])
    return starts, ends


def _push_delays(problem: Problem) -> list[Floats]:
    """CG-BP with the delay from the server before, which is any: the least, and the median."""
    if problem.push is None or problem.num_servers < 2:
        return []
    delays_s = problem.push.decode.between_s.copy()
    np.fill_diagonal(delays_s, np.inf)
    return [delays_s.min(axis=0), np.median(delays_s, axis=0)]


def _groups(instance: Instance, size: int) -> Iterator[Floats]:
    """Sessions of similar clients together: (C,) the share of each client in each group of at most `size`."""
    left = instance.sessions.copy()
    delays = client_delays(instance)
    while left.any():
        leader = int(np.argmax(left))
        nearest = np.argsort(np.abs(delays - delays[leader]).sum(axis=1), kind="stable")
        share, room = np.zeros(left.size), size
        for client in nearest.tolist():
            taken = min(room, int(left[client]))
            share[client] = taken
            left[client] -= taken
            room -= taken
        yield share / share.sum()


def client_delays(instance: Instance) -> Floats:
    """(C, J): of a first hop, finite."""
    push = instance.costs.push
    delays = np.asarray(instance.costs.relay_s if push is None else push.from_client_s)
    return np.where(np.isfinite(delays), delays, instance.penalty_s)


def _hop_s(instance: Instance, weights: Floats) -> Floats:
    """(J,): what a hop to each server costs a group of sessions beside computing."""
    push, clients = instance.costs.push, np.flatnonzero(weights)
    if push is None:
        return np.asarray(weights[clients] @ np.asarray(instance.costs.relay_s)[clients])
    between_s = push.between_s.copy()
    np.fill_diagonal(between_s, np.inf)
    near_s = np.median(between_s, axis=0) if between_s.size > 1 else np.zeros(1)
    ends_s = weights[clients] @ (push.from_client_s[clients] + push.to_client_s[:, clients].T) / 2
    return np.asarray(np.minimum(near_s, ends_s))


def _in_order(instance: Instance, shares: tuple[tuple[int, int], ...], weights: Floats) -> list[tuple[int, int]]:
    """For push, each next server the nearest one; for relay the order does not matter."""
    push = instance.costs.push
    left: dict[int, int] = dict(shares)
    if push is None:
        return list(left.items())
    clients = np.flatnonzero(weights)
    delay_s: Floats = weights[clients] @ push.from_client_s[clients]
    ordered = []
    while left:
        server = min(left, key=lambda each: float(delay_s[each]))
        ordered.append((server, left.pop(server)))
        delay_s = np.asarray(push.between_s[server])
    return ordered
