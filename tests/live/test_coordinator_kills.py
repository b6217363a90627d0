"""The coordinator is killed at twenty moments, whatever it is doing: nobody loses a session, a token or a block."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.live.commands import wait_for
from tests.live.emulated_swarm import (
    READY_S,
    EmulatedSwarm,
    SessionsClient,
    by_name,
    emulated_swarm,
    network_if_possible,
)
from tests.live.forked import Forked, Forks
from tests.models import VOCABULARY

pytestmark = [pytest.mark.live, pytest.mark.timeout(580)]

KILLS, SEED = 20, 20251221
AT_ONCE, TEXTS = 2, 6
SPANS = {"first": "0:3", "second": "3:6"}


class Person(threading.Thread):
    """Has some sessions at any time, and compares their tokens with the local model's."""

    def __init__(self, client: SessionsClient, local: Any) -> None:
        super().__init__(daemon=True)
        chance = random.Random(SEED)
        self._client, self._next = client, 0
        self._asked = []
        for _ in range(TEXTS):
            prompt = [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(3, 30))]
            tokens = chance.randint(8, 40)
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            expected = local.generate(torch.tensor([prompt]), **options)[0].tolist()
            self._asked.append((prompt, tokens, expected))
        self.stop, self.right, self.wrong = threading.Event(), 0, ""

    def run(self) -> None:
        running = [self._begin() for _ in range(AT_ONCE)]
        try:
            while running:
                name, expected = running.pop(0)
                found = self._client.wait(name, "done")["tokens"]
                assert found == expected, f"other tokens than the local model's: {found}, not {expected}"
                self.right += 1
                if not self.stop.is_set():
                    running.append(self._begin())
        except BaseException as error:  # noqa: BLE001 - told to the test
            self.wrong = str(error)

    def more(self, answers: int = 1) -> None:
        """Wait for so many more right answers."""
        target = self.right + answers
        wait_for(lambda: self.wrong or self.right >= target, timeout_s=READY_S, what="right answers")
        assert not self.wrong, self.wrong

    def end(self) -> None:
        self.stop.set()
        self.join(READY_S)
        assert not self.is_alive()
        assert not self.wrong, self.wrong

    def _begin(self) -> tuple[str, list[int]]:
        prompt, tokens, expected = self._asked[self._next % TEXTS]
        self._next += 1
        return self._client.start(prompt, tokens), expected


@pytest.fixture
def swarm(llama: Path, tmp_path: Path) -> Iterator[EmulatedSwarm]:
    """Two servers that stay, and from time to time a third."""
    hosts = ["coordinator", *SPANS, "third", "client", "admin"]
    with (
        Forks() as forks,
        network_if_possible(hosts) as wan,
        emulated_swarm(forks, llama, tmp_path, wan, replan_s=1.0) as swarm,
    ):
        for name, span in SPANS.items():
            swarm.serve(name, "--blocks", span)
        swarm.wait_status(lambda status: status["covered"], "all blocks served")
        yield swarm


class Moments:
    """What the coordinator is in the middle of when it is killed."""

    def __init__(self, swarm: EmulatedSwarm, folder: Path) -> None:
        self._swarm, self._identity = swarm, folder / "third.key"
        self._third: Forked | None = None
        self.all: tuple[Callable[[], None], ...] = (self.registration, self.replan, self.ticket, self.idle)

    def registration(self) -> None:
        """A server comes back whose death the coordinator has not noticed yet, or one that it does not know."""
        if self._third is not None:
            self._third.kill()
        words = ("--identity", str(self._identity), "--max-blocks", "2", "--memory", "2MB")
        self._third = self._swarm.serve("third", *words)

    def replan(self) -> None:
        self._swarm.run("admin", "replan", "--state", self._swarm.state, "--reason", "the test wants one")

    def ticket(self) -> None:
        """Sessions begin all the time."""

    def idle(self) -> None:
        """Long enough for what was begun before."""
        time.sleep(0.5)


def test_no_session_is_lost_no_token_wrong_and_nothing_loaded_again(
    swarm: EmulatedSwarm, local: Any, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    stay = [swarm.servers[name] for name in SPANS]
    loaded = [loads(server) for server in stay]
    assert all(times == 1 for times in loaded)
    client = swarm.client("client", coordinator_timeout=0.5, min_backoff=0.05, max_retries=12)
    person, moments = Person(client, local), Moments(swarm, tmp_path)
    person.start()
    person.more()
    for number in range(KILLS):
        moments.all[number % len(moments.all)]()
        time.sleep(chance.uniform(0.0, 1.0))
        swarm.kill_coordinator()
        if number % 5 == 0:
            person.more(AT_ONCE + 1)  # at least one has begun without a coordinator
        else:
            time.sleep(chance.uniform(0.0, 0.5))
        swarm.start_coordinator()
        if number % 2:  # or it is killed again before its members are back
            swarm.wait_status(is_whole, f"the servers are back after kill {number}")
    person.more()
    person.end()
    status = swarm.wait_status(lambda status: status if is_whole(status) and is_empty(status) else None, "all is over")
    assert [loads(server) for server in stay] == loaded
    assert all(server.is_running for server in stay)
    for name, span in SPANS.items():
        start, end = map(int, span.split(":"))
        assert by_name(status)[name]["span"] == [start, end]
    assert status["plan"]
    assert len({server["peer"] for server in status["servers"]}) == len(status["servers"])


def loads(server: Forked) -> int:
    return (server.out + server.err).count(" loaded: ")


def is_whole(status: dict[str, Any]) -> bool:
    servers = by_name(status)
    return all(name in servers and servers[name]["state"] == "ready" for name in SPANS)


def is_empty(status: dict[str, Any]) -> bool:
    """No session is left, nor what was reserved for one."""
    reserved = [server["reserved_block_tokens"] for server in status["servers"]]
    return not status["sessions"] and not status["queue"] and not any(reserved)
