"""Which blocks servers get, in which order they move, and what happens when one comes, goes or cannot load."""

from dataclasses import replace
from pathlib import Path

import pytest

from geopetals.cluster_io import dump_cluster, parse_cluster
from geopetals.coordinator.core import events as ev
from geopetals.coordinator.messages import Span
from geopetals.planning import plan, report_json
from geopetals.planning.methods import Budget
from tests.coordinator.core import invariants
from tests.coordinator.core.virtual_swarm import VirtualSwarm, registration

SLOW, FAST = 0.01, 0.002


def three_servers(first: int = 0) -> VirtualSwarm:
    """That join one by one, in another order each."""
    swarm = VirtualSwarm(check=invariants.check)
    servers = (("s1", 5_500_000, SLOW), ("s2", 7_500_000, 0.005), ("s3", 4_500_000, 0.004))
    for peer, memory_bytes, block_s in (*servers[first:], *servers[:first]):
        swarm.join(peer, registration(memory_bytes=memory_bytes, block_s=block_s))
        swarm.run(4)
    swarm.run(20)
    return swarm


def held(swarm: VirtualSwarm) -> dict[str, Span | None]:
    return {machine.peer: machine.span for machine in swarm.machines.values() if machine.up}


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_plan_is_the_one_that_geopetals_plan_makes_of_the_same_cluster(first: int, tmp_path: Path) -> None:
    swarm = three_servers(first)
    cluster = swarm.core.cluster()
    assert cluster is not None
    same = parse_cluster(dump_cluster(cluster), directory=tmp_path)
    report = report_json(plan(same, method="search", objective="push", budget=Budget()))
    planned = {each["server"]: [each["blocks"]["start"], each["blocks"]["end"]] for each in report["servers"]}
    assert swarm.core.placer.plan["proposal"] == planned
    assert {peer: [*span] for peer, span in held(swarm).items() if span} == planned


def test_sessions_are_served_from_the_moment_all_blocks_are() -> None:
    swarm = VirtualSwarm(check=invariants.check)
    swarm.join("s1", registration(memory_bytes=8_000_000))
    swarm.join("s2", registration(memory_bytes=8_000_000))
    swarm.ask("c", "early")
    swarm.run_until(lambda: all(swarm.serving()), 5)
    swarm.run(0.6)
    swarm.ask("c", "later")
    assert swarm.sessions["later"].admitted_s is not None


def test_a_faster_server_joins_and_the_plan_changes_once() -> None:
    swarm = three_servers()
    before = len([entry for entry in swarm.explained if entry.what == "plan adopted"])
    swarm.join("s4", registration(memory_bytes=14_000_000, block_s=FAST))
    swarm.run(60)
    adopted = [entry for entry in swarm.explained if entry.what == "plan adopted"][before:]
    assert len(adopted) <= 1
    assert held(swarm)["s4"] is not None
    assert all(swarm.serving())


def test_a_burst_of_joins_gives_one_plan() -> None:
    swarm = three_servers()
    before = swarm.core.planning.made_count
    for number in range(5):
        swarm.join(f"more{number}", registration(memory_bytes=6_000_000))
        swarm.run(0.2)
    swarm.run(30)
    assert swarm.core.planning.made_count == before + 1


def test_what_a_dead_server_held_is_served_again() -> None:
    swarm = three_servers()
    swarm.join("s4", registration(memory_bytes=14_000_000, block_s=FAST))
    swarm.run(60)
    swarm.kill("s4")
    swarm.run_until(lambda: all(swarm.serving()), 60)


def test_a_server_that_is_back_within_the_grace_keeps_its_blocks() -> None:
    swarm = three_servers()
    machine = swarm.machines["s2"]
    span, epoch, assigned = machine.span, machine.epoch, len(swarm.assigned)
    swarm.tell(ev.ServerLost(peer="s2"))
    swarm.run(2)
    swarm.join("s2", registration(memory_bytes=9_000_000, block_s=0.005, held=span, epoch=epoch))
    swarm.run(30)
    assert len(swarm.assigned) == assigned
    assert all(swarm.serving())


def test_a_new_coordinator_leaves_servers_with_what_they_hold() -> None:
    before = three_servers()
    swarm = VirtualSwarm(check=invariants.check)
    swarm.now = before.now
    for machine in before.machines.values():
        swarm.machines[machine.peer] = machine
        held_now = replace(machine.register, held=machine.span, epoch=machine.epoch)
        swarm.join(machine.peer, held_now)
    swarm.run(40)
    assert swarm.assigned == []
    assert all(swarm.serving())


def test_a_load_that_fails_leaves_the_server_with_what_it_had() -> None:
    swarm = three_servers()
    for machine in swarm.machines.values():
        machine.fails = True
    swarm.join("s4", registration(memory_bytes=14_000_000, block_s=FAST))
    swarm.run(100)
    assert all(swarm.serving())
    failed = [entry for entry in swarm.explained if entry.what == "load failed"]
    retried = [entry for entry in failed if "s4" in entry.why]
    assert len(retried) <= 1


def test_pins_and_limits_of_operators_are_kept() -> None:
    swarm = VirtualSwarm(check=invariants.check)
    swarm.join("pinned", registration(pin=Span(3, 7)))
    swarm.join("small", registration(max_blocks=2))
    swarm.join("large", registration())
    swarm.run(40)
    spans = held(swarm)
    assert spans["pinned"] == Span(3, 7)
    assert spans["small"] is not None
    assert spans["small"].end - spans["small"].start <= 2
    assert all(swarm.serving())


def test_replan_on_demand_is_explained() -> None:
    swarm = three_servers()
    count = len(swarm.explained)
    swarm.tell(ev.ReplanAsked(reason="somebody wants it"))
    assert "somebody wants it" in swarm.explained[count].why


def test_a_link_that_degrades_moves_new_sessions_within_ten_seconds() -> None:
    swarm = VirtualSwarm(check=invariants.check)
    for peer in ("a", "b"):
        swarm.join(peer, registration(memory_bytes=40_000_000, max_blocks=6))
    for peer in ("c", "d"):
        swarm.join(peer, registration(memory_bytes=40_000_000, max_blocks=6))
    swarm.run(40)
    swarm.ask("someone", "before")
    first, last = (hop.peer_id for hop in swarm.sessions["before"].chain)
    swarm.rtts[min(first, last), max(first, last)] = 0.5
    swarm.run(6)
    swarm.ask("someone", "after")
    assert tuple(hop.peer_id for hop in swarm.sessions["after"].chain) != (first, last)


@pytest.mark.parametrize("present", [1, 2])
def test_too_few_servers_hold_what_they_can_and_sessions_are_told_what_is_missing(present: int) -> None:
    swarm = VirtualSwarm(check=invariants.check)
    for number in range(present):
        swarm.join(f"s{number}", registration(memory_bytes=4_000_000))
    swarm.run(20)
    swarm.ask("c", "one")
    refused = swarm.sessions["one"].refused
    assert refused is not None
    assert "Blocks" in refused.why
    assert sum(swarm.serving()) == sum(count > 0 for count in swarm.serving()) >= 3 * present
