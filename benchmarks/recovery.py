"""How long does a generation pause when a server of its chain dies?

Method. A Llama of six blocks (random weights, hidden size 64, float32, CPU) on two servers of three blocks each, with
one replica of each, on loopback. A session samples tokens after a prompt of --prompt tokens; every 20 tokens a server
that it uses is killed, in turn by
  kill  SIGKILL: its connections are reset
  stop  SIGSTOP: they stay open and nothing comes, so that heartbeats decide
and ten tokens later another one takes its place, of which the client is told, as it finds out by itself every 30 s.
(A client that must look for servers first also waits for the DHT, up to 3 s where one of its nodes hangs.) The pause
is the time between the two tokens around the failure, less the median time between tokens. It holds noticing, another
chain, and filling its caches with all tokens so far; with a larger model the last part grows as its prefill does. At
the end the tokens must be those of the unmodified model in one process, or nothing is written. Stock PETALS has no
figure: its recovery does not work.

    python benchmarks/recovery.py [--quick] [--prompt TOKENS] [--out FILE]
"""

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import percentiles, write_results
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).parents[1]))

from geopetals import AutoDistributedModelForCausalLM
from geopetals.swarm.local import LocalSwarm
from tests.models import VOCABULARY, save_llama

_SPANS = [(0, 3), (3, 6)]
_BETWEEN = 20
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="four failures instead of three rounds of twenty")
    parser.add_argument("--prompt", type=int, default=500, help="tokens of the prompt")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recovery.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        model = save_llama(Path(folder) / "llama", max_position_embeddings=4096)
        for seed in range(1 if args.quick else 3):
            runs += _round(model, args.prompt, 4 if args.quick else 20, seed)
    write_results(args.out, summary=_summary(runs), runs=runs, seed=0)
    return 0


class _Failures(StoppingCriteria):
    """Notes when each token is there; kills and replaces servers between tokens."""

    def __init__(self, swarm: LocalSwarm, client: Any, session: Any, failures: int, seed: int) -> None:
        self._swarm, self._client, self._session, self._left = swarm, client, session, failures
        self._chance = random.Random(seed)
        self._founder = min(swarm.servers, key=lambda server: server.number).peer_id
        self._dead: list[Any] = []
        self._ended_at = 0.0
        self._way: str | None = None
        self.itl_s: list[float] = []
        self.pauses: list[tuple[str, float]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self._ended_at:
            took_s = time.perf_counter() - self._ended_at
            if self._way is None:
                self.itl_s.append(took_s)
            else:
                self.pauses.append((self._way, took_s))
        self._way = None
        self._act(input_ids.shape[1])
        self._ended_at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def _act(self, tokens: int) -> None:
        if tokens % _BETWEEN == 0 and self._left:
            self._left -= 1
            self._way = "kill" if self._left % 2 else "stop"
            used = {hop.peer_id for hop in self._session.route} - {self._founder}
            victim = self._chance.choice([server for server in self._swarm.servers if server.peer_id in used])
            self._swarm.kill(victim, _SIGNALS[self._way])
            self._dead.append((self._way, victim))
        elif tokens % _BETWEEN == _BETWEEN // 2 and self._dead:
            way, victim = self._dead.pop()
            if way == "stop":
                self._swarm.kill(victim)
            self._swarm.add((victim.start, victim.end))
            self._client.run(self._client.refresh_async())


def _round(directory: Path, prompt: int, failures: int, seed: int) -> list[dict[str, Any]]:
    ids = torch.randint(3, VOCABULARY, (1, prompt), generator=torch.Generator().manual_seed(seed))
    tokens = (failures + 2) * _BETWEEN
    with LocalSwarm(str(directory)) as swarm:
        swarm.start(spans=[*_SPANS, *_SPANS])
        model = AutoDistributedModelForCausalLM.from_pretrained(directory, join=swarm.token)
        try:
            with model.inference_session(max_length=prompt + tokens) as session:
                watch = _Failures(swarm, model.swarm, session, failures, seed)
                found = _generate(model, ids, tokens, seed, StoppingCriteriaList([watch]))
        finally:
            model.close()
    local = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if not torch.equal(found, _generate(local, ids, tokens, seed, StoppingCriteriaList())):
        raise SystemExit("the tokens are not those of the unmodified model")
    usual_s = statistics.median(watch.itl_s)
    runs = [{"round": seed, "way": way, "pause_s": took_s - usual_s, "itl_s": usual_s} for way, took_s in watch.pauses]
    print(*runs, sep="\n", flush=True)
    return runs


def _generate(model: Any, ids: torch.Tensor, tokens: int, seed: int, criteria: StoppingCriteriaList) -> torch.Tensor:
    torch.manual_seed(seed)
    found: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=True,
        top_k=0,
        stopping_criteria=criteria,
    )
    return found


def _summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for way in _SIGNALS:
        pauses = [run["pause_s"] for run in runs if run["way"] == way]
        summary |= {**percentiles(f"pause_s_{way}", pauses), f"pause_s_{way}_max": max(pauses)}
    return {**summary, "failures": len(runs), "itl_s_p50": statistics.median(run["itl_s"] for run in runs)}


if __name__ == "__main__":
    sys.exit(main())
