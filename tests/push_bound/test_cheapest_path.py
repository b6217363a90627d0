"""The bound of push against brute force over sets and orders, and what it says where it is not exact."""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals import push_bound
from geopetals.problem import Floats, Ints, OneWayDelays
from geopetals.push_bound import PathBound, cheapest_path
from geopetals.push_bound.graph import Graph
from geopetals.push_bound.prices import first_prices
from geopetals.push_bound.relaxation import Relaxation, reusing_s

KINDS = ("map", "sites", "any", "missing", "none", "equal")


@dataclass(frozen=True, slots=True)
class Case:
    delays: OneWayDelays
    block_s: Floats
    most: Ints
    num_blocks: int

    def bound(self) -> PathBound:
        return cheapest_path(self.delays, self.block_s, self.most, self.num_blocks)

    def time_s(self, path: push_bound.Path) -> float:
        servers = [server for server, _ in path]
        delay_s = self.delays.from_client_s[0, servers[0]] + self.delays.to_client_s[servers[-1], 0]
        delay_s += sum(self.delays.between_s[hop] for hop in pairwise(servers))
        return float(delay_s + sum(self.block_s[server] * blocks for server, blocks in path))


def make_case(seed: int, servers: int, kind: str, *, room: float, blocks: int, equal_servers: bool = False) -> Case:
    rng = np.random.default_rng(seed)
    places = rng.uniform(0, 0.1, (servers + 1, 2))
    if kind == "sites":
        places = places[rng.integers(0, min(3, servers + 1), servers + 1)]
    delay_s = 0.002 + np.hypot(*(places[:, None] - places).T)
    if kind in ("any", "missing"):
        delay_s = rng.uniform(0.005, 0.1, delay_s.shape)
    if kind == "missing":
        delay_s[rng.random(delay_s.shape) < 0.4] = np.inf
    if kind in ("none", "equal"):
        delay_s = np.full_like(delay_s, 0.0 if kind == "none" else 0.03)
    np.fill_diagonal(delay_s, np.inf)
    most = np.maximum(np.round(rng.uniform(0.4, 1.6, servers) * room * blocks / servers), 1).astype(np.int64)
    while most.sum() < blocks:
        most[rng.integers(servers)] += 1
    return Case(
        OneWayDelays(from_client_s=delay_s[:1, 1:], between_s=delay_s[1:, 1:], to_client_s=delay_s[1:, :1]),
        np.full(servers, 0.005) if equal_servers else rng.uniform(0.001, 0.02, servers),
        np.full(servers, most.max()) if equal_servers else most,
        blocks,
    )


@st.composite
def cases(draw: st.DrawFn, most_servers: int) -> Case:
    return make_case(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, most_servers)),
        draw(st.sampled_from(KINDS)),
        room=draw(st.sampled_from([1.0, 1.3, 2.0, 4.0])),
        blocks=draw(st.integers(1, 16)),
        equal_servers=draw(st.booleans()),
    )


def brute_force_s(case: Case) -> float:
    """Each set of servers: its shortest path, and the least computing of any numbers of blocks."""
    between_s, from_s, to_s = case.delays.between_s, case.delays.from_client_s[0], case.delays.to_client_s[:, 0]

    @cache
    def shortest_s(visited: frozenset[int], last: int) -> float:
        before = visited - {last}
        if not before:
            return float(from_s[last])
        return min(shortest_s(before, each) + float(between_s[each, last]) for each in before)

    least_s = np.inf
    for count in range(1, min(case.block_s.size, case.num_blocks) + 1):
        for chosen in combinations(range(case.block_s.size), count):
            compute_s = {0: 0.0}
            for server in chosen:
                shares = range(1, int(case.most[server]) + 1)
                grown: dict[int, float] = {}
                for done, spent_s in compute_s.items():
                    for share in shares:
                        total_s = spent_s + case.block_s[server] * share
                        grown[done + share] = min(grown.get(done + share, np.inf), total_s)
                compute_s = grown
            path_s = min(shortest_s(frozenset(chosen), last) + to_s[last] for last in chosen)
            least_s = min(least_s, path_s + compute_s.get(case.num_blocks, np.inf))
    return float(least_s)


def check_path(case: Case, found: PathBound) -> None:
    servers = [server for server, _ in found.path]
    assert len(set(servers)) == len(servers)
    assert sum(blocks for _, blocks in found.path) == case.num_blocks
    assert all(1 <= blocks <= case.most[server] for server, blocks in found.path)
    assert case.time_s(found.path) == pytest.approx(found.reached_s, rel=1e-9, abs=0)


@settings(max_examples=60, deadline=None)
@given(case=cases(most_servers=7))
def test_it_is_the_cheapest_of_all_paths(case: Case) -> None:
    found = case.bound()
    assert found.least_s == found.reached_s == pytest.approx(brute_force_s(case), rel=1e-9, abs=0)
    if np.isfinite(found.reached_s):
        check_path(case, found)


@settings(max_examples=40, deadline=None)
@given(case=cases(most_servers=6))
def test_bounds_hold_with_any_lists_and_stay_when_lists_grow(case: Case) -> None:
    graph, least_s = Graph.from_delays(case.delays, case.block_s, case.most, case.num_blocks), brute_force_s(case)
    servers, slack = range(case.block_s.size), 1 + 1e-9
    bounds_s = [reusing_s(case.delays, case.block_s, case.most, case.num_blocks)]
    for length in range(case.block_s.size):
        relaxation = Relaxation(graph, [[each for each in servers if each != j][:length] for j in servers])
        bounds_s.append(relaxation.least_s())
        relaxation.set_prices(first_prices(graph))
        assert relaxation.least_s() <= least_s * slack
    assert all(one <= other * slack for one, other in pairwise([*bounds_s, least_s]))


@pytest.mark.parametrize("kind", KINDS)
def test_25_servers_are_searched_to_the_end(kind: str) -> None:
    for room in (1.1, 3.0):
        case = make_case(7, 25, kind, room=room, blocks=24)
        found = case.bound()
        assert found.least_s == found.reached_s
        check_path(case, found)


def test_a_search_that_is_stopped_says_so_and_its_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = 0
    for seed in range(3):
        case = make_case(seed, 17, "map", room=1.3, blocks=30)
        exact = case.bound()
        with monkeypatch.context() as patch:
            patch.setattr(push_bound, "_FIRST_WIDTH", 2)
            patch.setattr(push_bound, "_STAGES", ((0, 3, 2),))
            found = case.bound()
        stopped += found.least_s < found.reached_s
        assert found.least_s <= exact.least_s * (1 + 1e-9)
        assert found.reached_s >= exact.reached_s * (1 - 1e-9)
        check_path(case, found)
    assert stopped


def test_more_servers_are_bounded_but_not_searched() -> None:
    case = make_case(0, 30, "map", room=2.0, blocks=40)
    found = case.bound()
    assert (found.searched, found.path, found.reached_s) == (False, (), float("inf"))
    few = Case(
        OneWayDelays(
            from_client_s=case.delays.from_client_s[:, :25],
            between_s=case.delays.between_s[:25, :25],
            to_client_s=case.delays.to_client_s[:25],
        ),
        case.block_s[:25],
        case.most[:25],
        case.num_blocks,
    )
    assert 0 < found.least_s <= few.bound().least_s


def test_the_same_case_gives_the_same_bound() -> None:
    case = make_case(3, 12, "map", room=1.2, blocks=24)
    assert case.bound() == case.bound()
