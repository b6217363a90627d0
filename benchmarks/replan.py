"""How long is a swarm without blocks, and without a plan, when the server that holds them dies?

Method. A coordinator and servers on loopback, each a process of its own; a Llama of six blocks (random weights, hidden
size 64, float32, CPU). Three servers have memory for three blocks each: two hold a half of the model each, the third
repeats one. Again and again one dies that nobody repeats: SIGKILL to its process and its p2pd, as a machine that fails;
the one that is too many must take its blocks. Another server is started then, for the next round. From the kill on,
each a look at the coordinator's status every 20 ms:
  noticed   the dead server counts as gone
  planned   there is a plan that was made because it was lost
  restored  all blocks have a server again that is ready
  served    a session that is asked for at the moment of the kill has its first token
Rounds in which another server was just taking the same blocks are left out. The coordinator waits `server_grace_s`
(5 s) for a server whose channel ended before it plans without it, and `settle_s` (2 s) for others to follow: both are
in the figures, with the defaults of a real swarm. Loading takes no time worth speaking of here: it is block bytes over
the disk's bandwidth elsewhere.

    python benchmarks/replan.py [--quick] [--kills N] [--out FILE]
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from provenance import percentiles, write_results

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.live.commands import wait_for
from tests.live.emulated_swarm import BLOCK_BYTES, EmulatedSwarm, SessionsClient, by_name, emulated_swarm, is_settled
from tests.live.forked import Forks
from tests.models import save_llama

_SEED, _MOST_S = 20251221, 120.0
_FIGURES = ("noticed_s", "planned_s", "restored_s", "served_s")
_DEFAULTS = {"settle_s": 2.0, "settle_most_s": 10.0, "drain_s": 30.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two kills")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "replan.json")
    args = parser.parse_args()
    kills = 2 if args.quick else args.kills
    runs = []
    with tempfile.TemporaryDirectory(prefix="replan-") as folder, Forks() as forks:
        model = save_llama(Path(folder) / "llama")
        with emulated_swarm(forks, model, Path(folder), **_DEFAULTS) as swarm:
            for number in range(3):
                _join(swarm, number)
            client = swarm.client("client", min_backoff=0.05)
            chance = random.Random(_SEED)
            for number in range(3, 3 + 2 * kills):
                found = _kill(swarm, client, chance)
                print(found, flush=True)
                runs += [found] if found["uncovered"] else []
                if len(runs) == kills:
                    break
                _join(swarm, number)
    write_results(args.out, summary=_summary(runs), runs=runs, seed=_SEED)
    return 0


def _join(swarm: EmulatedSwarm, number: int) -> None:
    """A server more that has blocks, and nobody moves any more."""
    name = f"server-{number}"
    swarm.serve(name, "--memory", str(5 * BLOCK_BYTES), "--max-blocks", "3")
    swarm.wait_status(
        lambda status: by_name(status).get(name, {}).get("span") and is_settled(status), f"{name} has blocks"
    )


def _kill(swarm: EmulatedSwarm, client: SessionsClient, chance: random.Random) -> dict[str, Any]:
    before = swarm.status()
    alone = [
        name
        for name, server in by_name(before).items()
        if server["span"] and any(before["replicas"][block] == 1 for block in range(*server["span"]))
    ]
    victim = chance.choice(sorted(alone))
    swarm.servers[victim].kill()
    began = time.perf_counter()
    served = _Served(client, began)
    found: dict[str, Any] = {"victim": victim, "span": by_name(before)[victim]["span"], "uncovered": False}

    def look() -> bool:
        status, now_s = swarm.status(), time.perf_counter() - began
        if by_name(status).get(victim, {"state": "gone"})["state"] != "gone":
            return False
        found.setdefault("noticed_s", now_s)
        if f"{victim} was lost" in status["plan"].get("reason", ""):
            found.setdefault("planned_s", now_s)
        if status["covered"]:
            found.setdefault("restored_s", now_s)
        found["uncovered"] |= not status["covered"]
        return "planned_s" in found and "restored_s" in found

    wait_for(look, timeout_s=_MOST_S, what="all blocks have a server again")
    found["served_s"] = served.wait()
    return found


class _Served:
    """A session that is asked for while blocks are missing; asked again for as long as it is refused."""

    def __init__(self, client: SessionsClient, began: float) -> None:
        self._client, self._began, self._served_s = client, began, 0.0
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def wait(self) -> float:
        self._thread.join(_MOST_S)
        assert self._served_s, "no session was served"
        return self._served_s

    def _ask(self) -> None:
        while not self._served_s:
            name = self._client.start([5, 6, 7], 1)
            said = wait_for(lambda name=name: self._client.said(name), timeout_s=_MOST_S, what="an answer")  # type: ignore[misc]
            if said[-1]["event"] == "done":
                self._served_s = time.perf_counter() - self._began


def _summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    summary: dict[str, float] = {"kills": len(runs)}
    for figure in _FIGURES:
        values = [run[figure] for run in runs]
        summary |= {**percentiles(figure, values), f"{figure}_max": max(values)}
    return summary


if __name__ == "__main__":
    sys.exit(main())
