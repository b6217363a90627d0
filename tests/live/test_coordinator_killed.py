"""A coordinator that is killed again and again, while people generate: nobody notices more than a pause."""

import contextlib
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.errors import NoChain
from tests.live.commands import wait_for
from tests.live.conftest import Connect
from tests.live.coordinated import READY_S, coordinated

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]

KILLS = 3


class Person(threading.Thread):
    """Generates one text after another until told to stop; `wrong` is what should not have happened."""

    def __init__(self, model: Any, local: Any, seed: int) -> None:
        super().__init__(name=f"person-{seed}", daemon=True)
        self._model, self._local, self._random = model, local, random.Random(seed)
        self.stop, self.texts, self.wrong = threading.Event(), 0, ""

    def run(self) -> None:
        while not self.stop.is_set() and not self.wrong:
            ids = torch.tensor([[self._random.randrange(3, 200) for _ in range(self._random.randint(3, 20))]])
            options = {"max_new_tokens": self._random.randint(4, 40), "do_sample": False}
            try:
                found = self._model.generate(ids, **options)
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                self.wrong = repr(error)
                return
            if not torch.equal(found, self._local.generate(ids, **options)):
                self.wrong = f"other tokens than the local model's: {found.tolist()}"
            self.texts += 1


def finds_servers(swarm: Any) -> bool:
    """Whether the client would find a chain by itself."""
    with contextlib.suppress(NoChain):
        return bool(swarm.run(swarm.chain_async(refresh=True)))
    return False


def test_no_session_is_lost_and_no_token_wrong(llama: Path, tmp_path: Path, connect: Connect, local: Any) -> None:
    chance = random.Random(20251221)
    with coordinated(llama, tmp_path) as swarm:
        servers = [swarm.add_server("--memory", "700KB") for _ in range(2)]
        for server in servers:
            server.wait_line(r"^serving blocks", timeout_s=READY_S)
        swarm.wait_status(lambda status: status["covered"], "all blocks served")
        loaded = [server.printed().count("serving blocks") for server in servers]
        model = connect(join=swarm.tokens["client"])
        wait_for(lambda: finds_servers(model.swarm), timeout_s=READY_S, what="the records of all servers")
        person = Person(model, local, seed=1)
        person.start()
        for _ in range(KILLS):
            assert swarm.coordinator is not None
            if chance.random() < 0.5:  # in the middle of making a plan, perhaps
                swarm.run("replan", "--state", swarm.folder / "state")
            person.stop.wait(chance.uniform(0.0, 2.0))
            swarm.coordinator.signal(signal.SIGKILL)
            swarm.coordinator.wait()
            person.stop.wait(chance.uniform(0.0, 1.0))
            swarm.start_coordinator()
            swarm.wait_status(lambda status: status["covered"], "the servers are back")
        texts = person.texts
        swarm.wait_status(lambda _: person.texts > texts or person.wrong, "one more text")
        person.stop.set()
        person.join(READY_S)
        assert not person.is_alive()
        assert not person.wrong, f"{person.wrong}: {swarm.status()['history']} {[each.printed() for each in servers]}"
        assert [server.printed().count("serving blocks") for server in servers] == loaded, (
            "nobody loaded anything again"
        )

        def settled(status: dict[str, Any]) -> bool:
            reserved = [server["reserved_block_tokens"] for server in status["servers"]]
            return not status["sessions"] and not status["queue"] and not any(reserved)

        swarm.wait_status(settled, "all cache is given back")
