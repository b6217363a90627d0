"""Moves in order, one after another: every block keeps a server that serves it, and the target is reached."""

from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.coordinator.core.moves import Standing, find_way, next_moves
from geopetals.coordinator.messages import Span

BLOCKS = 8


@st.composite
def spans(draw: st.DrawFn, most: int) -> Span:
    start = draw(st.integers(0, BLOCKS - 1))
    return Span(start, draw(st.integers(start + 1, min(BLOCKS, start + most))))


@st.composite
def swarms(draw: st.DrawFn) -> list[Standing]:
    found = []
    for number in range(draw(st.integers(2, 6))):
        most = draw(st.integers(3, BLOCKS))
        serving = draw(st.none() | spans(most))
        found.append(Standing(peer=f"s{number}", serving=serving, target=draw(spans(most)), most_blocks=most))
    return found


def served(held: dict[str, Span | None]) -> set[int]:
    return {block for span in held.values() if span is not None for block in range(*span)}


@given(swarms())
@settings(max_examples=300, deadline=None)
def test_moves_never_take_the_last_server_of_a_block_away(servers: list[Standing]) -> None:
    held = {server.peer: server.serving for server in servers}
    whole = served(held) == set(range(BLOCKS))
    for _ in range(60):
        now = [
            Standing(peer=each.peer, serving=held[each.peer], target=each.target, most_blocks=each.most_blocks)
            for each in servers
        ]
        moves = next_moves(BLOCKS, now)
        if not moves:
            break
        before = dict(held)
        held |= {move.peer: None for move in moves}
        if served(before) == set(range(BLOCKS)):
            assert served(held) == set(range(BLOCKS))
        held |= {move.peer: move.span for move in moves}
        assert all(move.span is None or len(range(*move.span)) <= most(servers, move.peer) for move in moves)
    if moves is not None:
        assert all(held[server.peer] == server.target for server in servers)
    if whole:
        assert served(held) == set(range(BLOCKS))


def most(servers: list[Standing], peer: str) -> int:
    return next(server.most_blocks for server in servers if server.peer == peer)


def test_two_servers_swap_by_way_of_a_third() -> None:
    servers = [
        Standing(peer="a", serving=Span(0, 4), target=Span(4, 8), most_blocks=4),
        Standing(peer="b", serving=Span(4, 8), target=Span(0, 4), most_blocks=4),
        Standing(peer="c", serving=Span(2, 6), target=Span(2, 6), most_blocks=4),
    ]
    way = find_way(BLOCKS, servers)
    assert way is not None
    assert way[0].detour
    assert way[0].peer == "c"


def test_two_servers_alone_cannot_swap() -> None:
    servers = [
        Standing(peer="a", serving=Span(0, 4), target=Span(4, 8), most_blocks=4),
        Standing(peer="b", serving=Span(4, 8), target=Span(0, 4), most_blocks=4),
    ]
    assert next_moves(BLOCKS, servers) is None
