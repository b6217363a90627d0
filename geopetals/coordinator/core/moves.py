"""The order in which servers go from what they hold to what they are to hold, so that no block loses its last server.

A server that moves serves nothing until it is ready again. Servers that hold nothing load at once. One that serves may
go when all its blocks have another server that serves them. Where none may go, one that may takes over, for a while,
the blocks of another: a detour. The whole way is looked for before the first step. While the swarm lacks blocks, nobody
can be served, and all go at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geopetals.coordinator.messages import Span
from geopetals.problem import Ints

_SHARE = 4
"""At most one in so many servers that serve is moving, or one."""
_MOST_WAYS = 300
"""Ways with detours that are looked at."""
_MOST_DETOURS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A server on its way."""

    peer: str
    serving: Span | None
    arriving: Span | None = None
    """What it will serve when it is ready again, if it moves."""
    target: Span | None
    most_blocks: int
    """That it can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Serve this span next. `detour`: it is not what the server is to hold in the end."""

    peer: str
    span: Span | None
    detour: bool = False


def next_moves(num_blocks: int, servers: Sequence[Standing]) -> tuple[Move, ...] | None:
    """What may begin now; empty: wait for those that move; None: no way to the target keeps all blocks served."""
    free = [each for each in servers if each.serving is None and each.arriving is None and each.target is not None]
    moves = [Move(peer=server.peer, span=server.target) for server in free]
    replicas = _replicas(num_blocks, [each.serving for each in servers])
    if not replicas.all():
        pending = [each for each in servers if each.serving is not None and each.serving != each.target]
        return (*moves, *(Move(peer=server.peer, span=server.target) for server in pending))
    way = find_way(num_blocks, servers)
    if way is None:
        return None
    serving = {each.peer: each.serving for each in servers}
    under_way = sum(each.arriving is not None for each in servers)
    allowed = max(sum(span is not None for span in serving.values()) // _SHARE, 1) - under_way
    for move in way:
        if allowed <= 0 or serving[move.peer] is None or not _may_leave(serving[move.peer], replicas):
            break
        moves.append(move)
        _add(serving[move.peer], replicas, -1)
        serving[move.peer] = None
        allowed -= 1
    return tuple(moves)


def find_way(num_blocks: int, servers: Sequence[Standing]) -> list[Move] | None:
    """Moves of servers that hold something, one after another, to the targets; None: none was found."""
    held = [_settled(server) for server in servers]
    ways: list[tuple[list[Move], list[Span | None], int]] = [([], held, 0)]
    seen = {tuple(held)}
    for number in range(_MOST_WAYS):
        if number == len(ways):
            return None
        way, held, detours = ways[number]
        way, held = _straight(num_blocks, servers, way, held)
        if all(span == server.target for span, server in zip(held, servers, strict=True)):
            return way
        if detours < _MOST_DETOURS:
            for index, span in _detours(num_blocks, servers, held):
                after = [*held[:index], span, *held[index + 1 :]]
                if tuple(after) not in seen:
                    seen.add(tuple(after))
                    step = Move(peer=servers[index].peer, span=span, detour=True)
                    ways.append(([*way, step], after, detours + 1))
    return None


def _settled(server: Standing) -> Span | None:
    """What it holds once what it does now is done; one that is free goes to its target before all others."""
    if server.arriving is not None:
        return server.arriving
    return server.target if server.serving is None else server.serving


def _straight(
    num_blocks: int, servers: Sequence[Standing], way: list[Move], held: list[Span | None]
) -> tuple[list[Move], list[Span | None]]:
    """As far as servers can go straight to their targets; first those that go where fewest are."""
    way, held = list(way), list(held)
    replicas = _replicas(num_blocks, held)
    while True:
        pending = [index for index, server in enumerate(servers) if held[index] != server.target]
        free = [index for index in pending if _may_leave(held[index], replicas)]
        if not free:
            return way, held
        index = min(free, key=lambda each: _need(servers[each], replicas))
        target = servers[index].target
        way.append(Move(peer=servers[index].peer, span=target))
        _add(held[index], replicas, -1)
        _add(target, replicas, 1)
        held[index] = target


def _detours(num_blocks: int, servers: Sequence[Standing], held: list[Span | None]) -> list[tuple[int, Span]]:
    """Servers that may leave, and what they could take over so that another may; the fewest blocks first, by servers
    that move in any case."""
    found: set[tuple[int, bool, int, Span]] = set()
    replicas = _replicas(num_blocks, held)
    stuck = [span for span, server in zip(held, servers, strict=True) if span is not None and span != server.target]
    for index, helper in enumerate(servers):
        if not _may_leave(held[index], replicas):
            continue
        _add(held[index], replicas, -1)
        for span in stuck:
            alone = span.start + np.flatnonzero(replicas[span.start : span.end] == 1)
            if alone.size and span is not held[index]:
                needed = Span(int(alone[0]), int(alone[-1]) + 1)
                if needed.end - needed.start <= helper.most_blocks:
                    found.add((needed.end - needed.start, held[index] == helper.target, index, needed))
        _add(held[index], replicas, 1)
    return [(index, span) for _, _, index, span in sorted(found)]


def _replicas(num_blocks: int, spans: Sequence[Span | None]) -> Ints:
    replicas = np.zeros(num_blocks, dtype=np.int64)
    for span in spans:
        _add(span, replicas, 1)
    return replicas


def _add(span: Span | None, replicas: Ints, count: int) -> None:
    if span is not None:
        replicas[span.start : span.end] += count


def _need(server: Standing, replicas: Ints) -> tuple[int, str]:
    target = server.target
    return (int(replicas[target.start : target.end].min()) if target else replicas.size, server.peer)


def _may_leave(span: Span | None, replicas: Ints) -> bool:
    return span is None or bool((replicas[span.start : span.end] > 1).all())
