import numpy as np
import pytest
from hypothesis import given, settings

from geopetals.placement.cg_bp import cg_bp
from geopetals.plan import Chain, Placement, Span
from geopetals.routing.backoff import paper_accounting, retry_wait_s
from geopetals.routing.petals import LeastWaitRouter, PetalsRouter, PingTimes, sessions_on
from geopetals.routing.state import RouterState
from tests.problems import all_chains, make_problem, seeds


@pytest.mark.parametrize(
    ("wait_s", "retry_s"),
    [(0, 0), (1e-9, 1), (1, 1), (1.0001, 3), (7, 7), (62, 63), (63.5, 123), (123, 123), (3600, 3603)],
)
def test_retries_are_those_of_petals(wait_s: float, retry_s: float) -> None:
    assert retry_wait_s(wait_s) == retry_s


def pair() -> RouterState:
    """Two servers with all blocks; the first is nearer, and has cache for two sessions."""
    problem = make_problem(servers=2, blocks=2, room=20.0)
    return RouterState(
        problem, Placement.of([(0, 2), (0, 2)], 2), slots=np.array([4, 400]), accounting=paper_accounting()
    )


PINGS = PingTimes(client_s=np.array([[0.01, 0.5]]), between_s=np.zeros((2, 2)))


def test_a_full_server_is_avoided_by_a_penalty() -> None:
    state = pair()
    router = PetalsRouter(state, PINGS)
    chosen = []
    for _ in range(3):
        route = router.route(0, 0.0)
        state.open(route, 0.0)
        chosen.append(route.chain.servers[0])
    assert chosen == [0, 0, 1]


def test_a_server_that_is_gone_is_not_taken_and_new_blocks_are_noticed() -> None:
    state = pair()
    router = PetalsRouter(state, PINGS)
    state.fail(0, 0.0)
    assert router.route(0, 0.0).chain.servers == (1,)
    state.resize(0, 0.0, slots=4, span=Span(1, 2))
    state.resize(1, 0.0, slots=4, span=Span(0, 1))
    assert router.route(0, 0.0).chain.servers == (1, 0)


def test_in_paper_mode_an_oversubscribed_server_is_not_full() -> None:
    state = pair()
    router = PetalsRouter(state, PINGS, session_capacity=np.array([2, 200]))
    for expected in (0, 0, 1, 1):
        route = router.route(0, 0.0)
        assert route.chain.servers == (expected,)
        state.open(route, 0.0)
    state.open(state.route_along(state.route(0, 0.0, avoid=[1]).chain, 0, 0.0), 0.0)
    assert sessions_on(state, 0.0).tolist() == [3, 2]
    assert router.route(0, 0.0).chain.servers == (0,)


@settings(deadline=None)
@given(seed=seeds)
def test_optimized_routing_minimises_cost_and_the_largest_wait(seed: int) -> None:
    problem = make_problem(seed, servers=5, blocks=5, room=6.0)
    placement = cg_bp(problem, 1).placement
    slots = placement.held * np.random.default_rng(seed).integers(1, 3, 5)
    state = RouterState(problem, placement, slots=slots, accounting=paper_accounting())
    router = LeastWaitRouter(state)

    def objective(chain: Chain) -> float:
        waits = [max(state.free_from_s(hop.server, hop.blocks, 0.5) - 0.5, 0.0) for hop in chain]
        return state.costs.chain_s(0, chain) + max(waits)

    for _ in range(8):
        route = router.route(0, 0.5)
        assert route.cost_s == pytest.approx(min(map(objective, all_chains(placement))))
        state.open(route, 0.5)
