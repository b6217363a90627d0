"""The bound of push against brute force over sets and orders, and what it says where it is not exact."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals import push_bound
from geopetals.problem import Floats, Ints, OneWayDelays
from geopetals.push_bound import PathBound, cheapest_path, circuit
from geopetals.push_bound.circuit import cheapest_circuit
from geopetals.push_bound.filling import path_s
from geopetals.push_bound.graph import Graph
from geopetals.push_bound.prices import first_prices
from geopetals.push_bound.relaxation import Relaxation, reusing_s

KINDS = ("map", "sites", "clusters", "any", "missing", "none", "equal")


@dataclass(frozen=True, slots=True)
class Case:
    delays: OneWayDelays
    block_s: Floats
    most: Ints
    num_blocks: int

    def graph(self) -> Graph:
        return Graph.from_delays(self.delays, self.block_s, self.most, self.num_blocks)

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
    if kind in ("sites", "clusters"):
        places = places[rng.integers(0, min(3, servers + 1), servers + 1)]
    if kind == "clusters":
        places += rng.uniform(0, 0.005, places.shape)
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
@given(case=cases(most_servers=6), seed=st.integers(0, 2**32 - 1))
def test_bounds_hold_with_any_prices(case: Case, seed: int) -> None:
    graph, least_s = case.graph(), brute_force_s(case)
    relaxation = Relaxation(graph)
    bounds_s = [reusing_s(case.delays, case.block_s, case.most, case.num_blocks), relaxation.least_s()]
    for price_s in (first_prices(graph), np.random.default_rng(seed).uniform(0, 0.1, case.block_s.size)):
        relaxation.set_prices(price_s)
        bounds_s.append(relaxation.least_s())
    assert all(bound_s <= least_s * (1 + 1e-9) for bound_s in bounds_s)


@settings(max_examples=40, deadline=None)
@given(case=cases(most_servers=7), hint=st.booleans())
def test_the_solver_finds_the_cheapest_of_all_paths(case: Case, hint: bool) -> None:
    graph, exact = case.graph(), case.bound()
    unit_s = 1e-12 * reusing_s(case.delays, case.block_s, case.most, case.num_blocks)
    if not np.isfinite(unit_s):
        return
    start = [server for server, _ in exact.path] if hint else []
    bound_s, servers = cheapest_circuit(graph, unit_s, exact.reached_s if hint else np.inf, start)
    least_s = brute_force_s(case)
    assert min(bound_s, least_s) == pytest.approx(least_s, rel=1e-9, abs=0)
    assert path_s(graph, servers) == pytest.approx(least_s, rel=1e-9, abs=0)


@pytest.mark.parametrize("kind", KINDS)
def test_25_servers_are_searched_to_the_end(kind: str) -> None:
    for room in (1.1, 3.0):
        case = make_case(7, 25, kind, room=room, blocks=24)
        found = case.bound()
        assert found.least_s == found.reached_s
        check_path(case, found)


@pytest.mark.parametrize(("seed", "servers", "room"), [(8, 25, 1.1), (12, 22, 1.0)])
def test_clusters_that_the_search_leaves_open_are_solved(seed: int, servers: int, room: float) -> None:
    case = make_case(seed, servers, "clusters", room=room, blocks=24)
    least_s, reached_s, _ = push_bound._searched(case.graph())
    found = case.bound()
    assert least_s < found.least_s == found.reached_s <= reached_s
    check_path(case, found)


def test_without_any_path_there_is_no_time() -> None:
    case = make_case(0, 18, "any", room=1.0, blocks=36)
    between_s = case.delays.between_s.copy()
    between_s[:9, 9:] = between_s[9:, :9] = np.inf
    found = cheapest_path(replace(case.delays, between_s=between_s), case.block_s, case.most, case.num_blocks)
    assert (found.least_s, found.reached_s, found.path) == (np.inf, np.inf, ())


def test_a_search_that_is_stopped_says_so_and_its_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = 0
    for seed in range(3):
        case = make_case(seed, 17, "map", room=1.3, blocks=30)
        exact = case.bound()
        with monkeypatch.context() as patch:
            patch.setattr(push_bound, "_FIRST_WIDTH", 2)
            patch.setattr(push_bound, "_WIDTH", 2)
            patch.setattr(circuit, "_WORK", 1e-3)
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
