"""Three times as many sessions as there is cache for, from two clients: all come to their turn, in fair order.

Servers emulate slow devices, so that it is clear how long a session takes; measured starts then stand against the
predicted ones.
"""

import random
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.wan import Wan, WanSpec
from tests.live.commands import wait_for
from tests.live.emulated_swarm import READY_S, EmulatedSwarm, SessionsClient, emulated_swarm
from tests.live.forked import Forks
from tests.live.wan_programs import why_not
from tests.models import VOCABULARY

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.live, pytest.mark.timeout(580)]

DEVICE = ("--emulate", "weights=60ms,per_session=0.2ms,fixed=5ms,per_token=0.1ms")
MANY, FEW = 40, 10
BETWEEN_S = 0.12
"""From one arrival to the next: a third of what one session takes of the swarm."""
PAGE_TOKENS = 16
ROOM = 54 * PAGE_TOKENS
BLOCKS = 3
QUICK: dict[str, Any] = {
    "min_backoff": 0.05,
    "connect_timeout": 20.0,
    "ping_timeout": 10.0,
    "coordinator_timeout": 60.0,
}


@pytest.fixture(scope="module")
def swarm(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedSwarm]:
    """Two servers, a half of the blocks each, with cache for a third of all sessions."""
    hosts = ["coordinator", "one", "other", "first", "second"]
    folder = tmp_path_factory.mktemp("overload")
    with (
        Forks() as forks,
        Wan(WanSpec.uniform(hosts, rtt_s=0.02)) as wan,
        emulated_swarm(forks, llama, folder, wan, page_tokens=PAGE_TOKENS) as swarm,
    ):
        for host, span in (("first", "0:3"), ("second", "3:6")):
            swarm.serve(host, *DEVICE, "--blocks", span, "--kv-cache-tokens", str(ROOM))
        swarm.wait_status(lambda status: status["covered"], "all blocks served")
        yield swarm


@pytest.fixture(scope="module")
def clients(swarm: EmulatedSwarm) -> tuple[SessionsClient, SessionsClient]:
    return swarm.client("one", **QUICK), swarm.client("other", **QUICK)


class Sizes:
    """Sessions of mixed sizes, and what the local model says."""

    def __init__(self, local: Any, seed: int) -> None:
        self._local, self._random = local, random.Random(seed)

    def next(self) -> tuple[list[int], int]:
        prompt = [self._random.randrange(3, VOCABULARY) for _ in range(self._random.randint(4, 60))]
        return prompt, self._random.randint(6, 18)

    def expected(self, prompt: list[int], tokens: int) -> list[int]:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        found: list[int] = self._local.generate(torch.tensor([prompt]), **options)[0].tolist()
        return found


class CacheWatch(threading.Thread):
    """Looks all the time whether more cache is promised or used than there is."""

    def __init__(self, swarm: EmulatedSwarm) -> None:
        super().__init__(daemon=True)
        self._swarm, self.ended = swarm, threading.Event()
        self.too_much: list[dict[str, Any]] = []
        self.fullest = 0.0

    def run(self) -> None:
        while not self.ended.wait(0.1):
            for server in self._swarm.status()["servers"]:
                cache, reserved = server["cache"], server["reserved_block_tokens"]
                self.fullest = max(self.fullest, reserved / cache["total"])
                if reserved + server["foreign_block_tokens"] > cache["total"] or cache["free"] < 0:
                    self.too_much.append(server)


def test_all_sessions_come_to_their_turn_in_fair_order(
    swarm: EmulatedSwarm, clients: tuple[SessionsClient, SessionsClient], local: Any
) -> None:
    greedy, modest = clients
    sizes = Sizes(local, seed=3)
    warm_up(clients, sizes)
    before = seen(swarm.status())
    watch = CacheWatch(swarm)
    watch.start()
    asked = [(client, *sizes.next()) for client, count in ((greedy, MANY), (modest, FEW)) for _ in range(count)]
    names = []
    for client, prompt, tokens in asked:
        names.append(client.start(prompt, tokens))
        time.sleep(BETWEEN_S)
    all_asked = swarm.wait_status(
        lambda status: status if len(seen(status) - before) == len(asked) else None, "all have asked"
    )
    done = [client.wait(name, "done", timeout_s=300) for name, (client, _, _) in zip(names, asked, strict=True)]
    for (_, prompt, tokens), said in zip(asked, done, strict=True):
        assert said["tokens"] == sizes.expected(prompt, tokens)
    watch.ended.set()
    status = swarm.wait_status(
        lambda status: status if not status["sessions"] and not status["queue"] else None, "the end of all sessions"
    )
    assert watch.too_much == []
    assert watch.fullest > 0.7, "there was not enough load"
    assert status["counts"]["refused"] == 0
    assert not any("session.retry" in client.process.err for client in clients), "servers had all cache promised"
    assert_fair(status["finished"])
    assert_predicted(all_asked, status["finished"])


def warm_up(clients: tuple[SessionsClient, SessionsClient], sizes: Sizes) -> None:
    """As many sessions as run at once: the coordinator learns how much slower they are then than its profiles say."""
    names = []
    for client in 8 * clients:
        names.append((client, client.start(*sizes.next())))
        time.sleep(BETWEEN_S)
    for client, name in names:
        client.wait(name, "done")


def seen(status: dict[str, Any]) -> set[str]:
    """Sessions that have asked."""
    return {each["session_id"] for kind in ("sessions", "queue", "finished") for each in status[kind]}


def assert_fair(finished: list[dict[str, Any]]) -> None:
    """Who has few sessions does not wait until the other's many have begun."""
    starts: dict[str, list[float]] = {}
    for each in finished:
        starts.setdefault(each["client"], []).append(each["started_s"])
    few, many = sorted(starts.values(), key=len)
    assert (len(few), len(many)) == (FEW, MANY)
    typical = statistics.median(few)
    behind = sum(start > typical for start in many)
    asked = max(each["asked_s"] for each in finished)
    waited = sum(start > asked for start in many)
    print(f"{behind} of {waited} sessions that the other client had waiting began after half of the few")
    assert behind > waited / 3


def assert_predicted(asked: dict[str, Any], finished: list[dict[str, Any]]) -> None:
    """What was predicted when all had asked, within 20 % or 0.5 s.

    A machine with other work to do makes emulated devices late, and with them all starts: most must be right, not all.
    """
    now, started_s = asked["coordinator"]["now"], {each["session_id"]: each["started_s"] for each in finished}
    queued = [(each["start_s"], started_s[each["session_id"]] - now) for each in asked["queue"]]
    assert all(predicted_s is not None for predicted_s, _ in queued)
    right = sum(abs(real_s - predicted_s) <= max(0.5, 0.2 * real_s) for predicted_s, real_s in queued)
    print(f"{right} of {len(queued)} starts as predicted; (predicted, real) in s:", *_rounded(queued))
    assert len(queued) >= FEW
    assert right > len(queued) / 2


def _rounded(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(round(predicted_s, 1), round(real_s, 1)) for predicted_s, real_s in pairs]


def test_beyond_the_bound_of_the_queue_clients_hear_when_to_ask_again(
    swarm: EmulatedSwarm, clients: tuple[SessionsClient, SessionsClient], local: Any
) -> None:
    swarm.restart_coordinator(queue_length=2)
    client, sizes = clients[0], Sizes(local, seed=4)
    prompt = [7] * (ROOM // 2 - 4)
    holding = [client.start(prompt, 4, pause_at=2) for _ in range(2)]
    for name in holding:
        client.wait(name, "paused")
    queued = [client.start(prompt[:40], 4) for _ in range(2)]
    swarm.wait_status(lambda status: len(status["queue"]) == 2, "a queue that is full")
    refused = client.start(prompt[:40], 4)
    said = wait_for(
        lambda: [each for each in client.said(refused) if each["event"] == "failed"],
        timeout_s=READY_S,
        what=lambda: f"a refusal: {client.process.printed()}",
    )[0]
    assert said["kind"] == "Busy"
    assert 0 < said["retry_after_s"] <= 600
    assert "try" in said["text"].lower() or "again" in said["text"].lower() or "wait" in said["text"]
    for name in holding:
        client.go_on(name)
    for name in (*holding, *queued):
        client.wait(name, "done")
    time.sleep(min(said["retry_after_s"], 5.0))  # as told
    again = client.wait(client.start(prompt[:40], 4), "done")
    assert again["tokens"] == sizes.expected(prompt[:40], 4)
