"""The rate found keeps the limits, one that is somewhat higher does not, and any measure of percentiles may be used."""

from dataclasses import replace

import numpy as np
import pytest

from geopetals.errors import UnsupportedInput
from geopetals.placement.load import largest_load
from geopetals.placement.search import placement_cost
from geopetals.plan import Placement
from geopetals.planning.slo import RESOLUTION, Limits, highest_rate, routed_percentiles
from geopetals.planning.slo_simulation import simulated_percentiles
from geopetals.problem import Contention, Problem
from tests.problems import make_problem


def a_problem(*, contended: bool = False) -> Problem:
    problem = make_problem(5, servers=8, blocks=10, clients=2, room=5.0)
    if not contended:
        return problem
    half = problem.decode_block_s / 2
    return replace(problem, contention=Contention(floor_s=half, session_s=half))


@pytest.mark.parametrize("known_rate", [0.002, 0.7, 40.0])
def test_it_finds_the_rate_at_which_a_measure_passes_the_limit(known_rate: float) -> None:
    def measure(placement: Placement, rate_per_s: float) -> tuple[float, float]:
        assert placement.covers()
        return 1.0, rate_per_s / known_rate

    problem = replace(make_problem(3, servers=4, blocks=4, room=40.0), output_tokens=2)
    found = highest_rate(problem, Limits(tpot_s=1.0), steps=0, percentiles=measure)
    assert found is not None
    assert known_rate / RESOLUTION <= found.rate_per_s <= known_rate


@pytest.mark.parametrize("contended", [False, True])
def test_the_placement_keeps_the_limits_at_its_rate(contended: bool) -> None:
    problem = a_problem(contended=contended)
    limits = Limits(ttft_s=3.0, tpot_s=0.9, percentile=90)
    found = highest_rate(problem, limits, steps=100)
    assert found is not None
    ttft_s, tpot_s = routed_percentiles(problem, "relay", 90)(found.placement, found.rate_per_s)
    assert (ttft_s, tpot_s) == (found.ttft_s, found.tpot_s)
    assert ttft_s <= limits.ttft_s
    assert tpot_s <= limits.tpot_s


def test_wider_limits_allow_no_lower_rate() -> None:
    problem = a_problem(contended=True)
    rates = []
    for tpot_s in (0.5, 1.0, 3.0):
        found = highest_rate(problem, Limits(tpot_s=tpot_s), steps=0)
        rates.append(0.0 if found is None else found.rate_per_s)
    assert rates[-1] > 0
    assert (np.diff(rates) >= -1e-12).all()


def test_simulated_arrivals_find_a_rate_too() -> None:
    problem, limits = a_problem(contended=True), Limits(ttft_s=6.0, tpot_s=1.5, percentile=50)
    measure = simulated_percentiles(problem, "relay", 50, sessions=60)
    found = highest_rate(problem, limits, steps=0, percentiles=measure)
    assert found is not None
    assert measure(found.placement, found.rate_per_s) == (found.ttft_s, found.tpot_s)
    assert found.ttft_s <= limits.ttft_s
    assert measure(found.placement, found.rate_per_s * 1000)[0] > limits.ttft_s


def test_limits_that_nobody_can_keep_give_none() -> None:
    assert highest_rate(a_problem(), Limits(ttft_s=1e-6), steps=0) is None


def test_limits_without_sense_are_refused() -> None:
    with pytest.raises(UnsupportedInput, match="above 0"):
        Limits(ttft_s=0)
    with pytest.raises(UnsupportedInput, match="percentile"):
        Limits(percentile=101)


@pytest.mark.parametrize("contended", [False, True])
def test_without_strict_limits_the_rate_is_what_memory_carries(contended: bool) -> None:
    problem = a_problem(contended=contended)
    found = highest_rate(problem, Limits(tpot_s=1e6, ttft_s=1e6), steps=0)
    assert found is not None
    assert found.sessions <= largest_load(problem)
    mean_s = placement_cost(problem, found.placement, found.sessions) / found.sessions
    in_progress = found.rate_per_s * mean_s
    assert in_progress + in_progress**0.5 <= found.sessions * 1.05 + 1
    other = replace(problem, demand_per_s=problem.demand_per_s * 37)
    again = highest_rate(other, Limits(tpot_s=1e6, ttft_s=1e6), steps=0)
    assert again is not None
    assert again.rate_per_s == pytest.approx(found.rate_per_s, rel=0.1)
