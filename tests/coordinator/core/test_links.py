"""Round trips: medians of recent samples, noticeable changes only, and estimates with honest errors."""

import itertools
import random

import numpy as np
import pytest

from geopetals.coordinator.core import Core
from geopetals.coordinator.core.links import Links
from geopetals.coordinator.core.settings import Settings
from geopetals.coordinator.messages import RateSample
from tests.coordinator.core.virtual_swarm import MODEL, VirtualSwarm, registration


def test_one_slow_sample_changes_nothing_and_a_slow_link_does() -> None:
    links = Links(Settings())
    for second in range(5):
        links.add("a", "b", 0.02, float(second), relayed=False)
    links.take({"a", "b"})
    links.add("b", "a", 2.0, 6.0, relayed=False)
    assert links.take({"a", "b"}) == (False, 0.0)
    for second in range(7, 12):
        links.add("a", "b", 0.2, float(second), relayed=False)
    assert links.take({"a", "b"}) == (True, pytest.approx(9.0))
    assert links.in_force["a", "b"] == 0.2


def test_noise_within_a_fifth_is_not_taken_into_account() -> None:
    links, rng = Links(Settings()), random.Random(0)
    links.add("a", "b", 0.1, 0.0, relayed=False)
    links.take({"a", "b"})
    for second in range(1, 50):
        links.add("a", "b", 0.1 * rng.uniform(0.85, 1.15), float(second), relayed=False)
        assert links.take({"a", "b"}) == (False, 0.0)


def test_estimates_of_links_on_a_plane_are_within_their_errors() -> None:
    rng = np.random.default_rng(1)
    names = [f"s{number}" for number in range(40)]
    places = rng.uniform(0, 0.1, (40, 2))
    true_s = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
    links = Links(Settings())
    for one, other in itertools.combinations(range(40), 2):
        if rng.random() < 0.3:
            links.add(names[one], names[other], float(true_s[one, other]) + 1e-6, 0.0, relayed=False)
    links.take(set(names))
    rtts, errors = links.matrix([], names)
    assert np.array_equal(rtts, rtts.T)
    assert not np.isnan(rtts).any()
    unmeasured = errors > 0
    assert unmeasured.sum() > 500
    off_s = np.abs(rtts - true_s)
    assert (off_s[unmeasured] <= errors[unmeasured] + 1e-5).all()
    assert np.median(off_s[unmeasured] / true_s[unmeasured]) < 0.2
    np.testing.assert_allclose(rtts[~unmeasured], true_s[~unmeasured], atol=1e-5)


def test_what_nobody_knows_anything_of_is_the_typical_link() -> None:
    links = Links(Settings(default_rtt_s=0.07))
    rtts, errors = links.matrix(["c"], ["s1", "s2"])
    assert rtts.shape == errors.shape == (3, 2)
    assert rtts[0, 0] == errors[0, 0] == 0.07
    links.add("s1", "s2", 0.03, 0.0, relayed=True)
    links.take({"s1", "s2"})
    rtts, errors = links.matrix(["c"], ["s1", "s2"])
    assert rtts[0, 0] == 0.03
    assert errors[1, 1] == 0
    links.forget("s2")
    assert links.matrix(["c"], ["s1", "s2"])[0][1, 1] == 0.07


def test_clients_know_nothing_of_each_other_and_are_estimated_by_servers() -> None:
    links = Links(Settings())
    for client, rtt_s in (("c1", 0.03), ("c2", 0.05)):
        links.add(client, "s1", rtt_s, 0.0, relayed=False)
        links.add(client, "c3", 0.5, 0.0, relayed=False)
    links.add("s1", "s2", 0.01, 0.0, relayed=False)
    links.take({"s1", "s2"})
    rtts, errors = links.matrix(["c1", "c2"], ["s1", "s2"])
    np.testing.assert_allclose(rtts, [[0.03, 0.03], [0.05, 0.05], [0.0, 0.01], [0.01, 0.0]])
    np.testing.assert_allclose(errors, [[0.0, 0.01], [0.0, 0.01], [0.0, 0.0], [0.0, 0.0]])


def test_what_servers_receive_is_shown_as_they_said_it_last() -> None:
    swarm = VirtualSwarm()
    for name in ("s0", "s1"):
        swarm.join(name, registration(memory_bytes=30_000_000))
    swarm.run(10)
    core = swarm.core
    links = core.links
    links.came("s0", (RateSample("c", 1e6), RateSample("s1", 2e6)))
    assert core.status(swarm.now)["links"]["rates"] == [["c", "s0", 1e6], ["s1", "s0", 2e6]]
    again = Core(MODEL, core.settings)
    again.restore(core.snapshot())
    assert again.links.rates == links.rates
    links.came("s0", (RateSample("c", 3e6),))
    assert core.status(swarm.now)["links"]["rates"] == [["c", "s0", 3e6]]
    links.came("s0", ())
    assert core.status(swarm.now)["links"]["rates"] == []
