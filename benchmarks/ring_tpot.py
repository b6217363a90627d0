"""Is the time per token of a chain that pushes the ring of its links, computing, and the software, and nothing else?

Method. A tiny Llama (6 blocks) on three servers of two blocks each and one client, each in a host of its own of an
emulated network. Each server is an emulated device that takes 3 ms + 1 ms per session and block to decode. One session
at a time makes 40 tokens from 16, greedily, on networks of these round trips in ms:

    network   client-s1  s1-s2  s2-s3  s3-client  client-s2    one way around
    none              0      0      0          0          0                 0
    country          20     10     16         24         30                35
    world            60     90     40        110        150               150

The time per token (TPOT) is the median time between tokens, without the first four. On the network without delays it
is computing plus overhead, computing 6 * (3 ms + 1 ms): that gives the overhead, in the same run, with the same
processes. Predicted on the others:

    ring delay (the last column) + computing + overhead

`error_percent` is how far what was measured is from it; a chain that relays would be 35 and 100 % above. Three rounds
with other prompts; tokens must be those of the unmodified model in one process and all hops must push, or nothing is
written. How late the emulator's packets were and the machine's load stand in each run. Needs root, or user namespaces.

    python benchmarks/ring_tpot.py [--quick] [--out FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from provenance import percentiles, write_results
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).parents[1]))

from geopetals import AutoDistributedModelForCausalLM
from geopetals.bench.our_server import OurServerSpec, our_swarm
from geopetals.swarm.emulation import DeviceSpec
from geopetals.wan import Wan, WanSpec
from tests.models import VOCABULARY, save_llama

_RING = ("client", "s1", "s2", "s3")
_SPANS = ((0, 2), (2, 4), (4, 6))
_DEVICE = DeviceSpec(weights_s=0.003, session_s=0.001)
_COMPUTE_MS = 1000 * _DEVICE.decode_s(blocks=6, sessions=1)
_LINKS = ("client-s1", "s1-s2", "s2-s3", "s3-client")
_RTT_MS = {
    "none": dict.fromkeys((*_LINKS, "client-s2"), 0.0),
    "country": dict(zip((*_LINKS, "client-s2"), (20.0, 10.0, 16.0, 24.0, 30.0), strict=True)),
    "world": dict(zip((*_LINKS, "client-s2"), (60.0, 90.0, 40.0, 110.0, 150.0), strict=True)),
}
_PROMPT, _TOKENS, _WARM_UP = 16, 40, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--client", nargs=2, metavar=("MODEL", "TOKEN"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ring_tpot.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.client:
        return _client(*args.client)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ring-") as folder:
        model = save_llama(Path(folder) / "llama")
        with (
            Wan(WanSpec.uniform(_RING, rtt_s=0.0)) as wan,
            _servers(model, wan) as token,
            _client_process(model, token, wan) as client,
        ):
            for seed in range(1 if args.quick else 3):
                runs += [_run(client, wan, model, network, seed) for network in _RTT_MS]
    write_results(args.out, summary=_summary(runs), runs=runs, seed=0)
    return 0


@contextmanager
def _servers(model: Path, wan: Wan) -> Iterator[str]:
    specs = [
        OurServerSpec(span=span, device=_DEVICE, address=wan.addresses[host], prefix=tuple(wan.prefix(host)))
        for host, span in zip(_RING[1:], _SPANS, strict=True)
    ]
    with our_swarm(model, specs, swarm="ring") as token:
        yield token


@contextmanager
def _client_process(model: Path, token: str, wan: Wan) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, __file__, "--client", str(model), token]
    process = wan.popen("client", command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.communicate(timeout=60)


def _client(directory: str, token: str) -> int:
    """A prompt as a JSON line in, the hops' modes, tokens and times between them out."""
    model = AutoDistributedModelForCausalLM.from_pretrained(directory, join=token)
    try:
        for line in sys.stdin:
            clock = _Clock()
            with model.inference_session(max_length=_PROMPT + _TOKENS) as session:
                tokens = _generate(model, json.loads(line), clock)
                modes = [hop.mode for hop in session.route]
            print(json.dumps({"modes": modes, "tokens": tokens, "itl_ms": clock.itl_ms()}), flush=True)
    finally:
        model.close()
    return 0


class _Clock(StoppingCriteria):
    """When each token was there."""

    def __init__(self) -> None:
        self._at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._at.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def itl_ms(self) -> list[float]:
        return [1e3 * (end - start) for start, end in pairwise(self._at[_WARM_UP:])]


def _generate(model: Any, prompt: list[int], clock: _Clock) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False}
    criteria = StoppingCriteriaList([clock])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria, **options)
    return [int(token) for token in found[0, len(prompt) :]]


def _run(client: "subprocess.Popen[str]", wan: Wan, directory: Path, network: str, seed: int) -> dict[str, Any]:
    assert client.stdin is not None
    assert client.stdout is not None
    for link, rtt_ms in _RTT_MS[network].items():
        wan.set(link, rtt_s=rtt_ms / 1000)
    prompt = torch.randint(3, VOCABULARY, (_PROMPT,), generator=torch.Generator().manual_seed(seed)).tolist()
    wan.reset()
    client.stdin.write(json.dumps(prompt) + "\n")
    client.stdin.flush()
    found = json.loads(client.stdout.readline())
    lateness = wan.lateness()
    if found["modes"] != ["push", "push", "answer"]:
        raise SystemExit(f"the hops of this chain are {found['modes']}: this benchmark is of a ring")
    local = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if found["tokens"] != _generate(local, prompt, _Clock()):
        raise SystemExit("the tokens are not those of the unmodified model")
    tpot_ms = statistics.median(found["itl_ms"])
    print({"network": network, "seed": seed, "tpot_ms": round(tpot_ms, 2)}, flush=True)
    return {
        "network": network,
        "seed": seed,
        "tpot_ms": tpot_ms,
        "itl_ms": found["itl_ms"],
        "lateness": lateness,
        "load_average": os.getloadavg()[0],
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    measured = {
        network: statistics.median(run["tpot_ms"] for run in runs if run["network"] == network) for network in _RTT_MS
    }
    overhead_ms = measured["none"] - _COMPUTE_MS
    summary = {"compute_ms": _COMPUTE_MS, "overhead_ms": overhead_ms, "overhead_ms_per_hop": overhead_ms / len(_SPANS)}
    for network in ("country", "world"):
        ring_ms = sum(_RTT_MS[network][link] for link in _LINKS) / 2
        predicted_ms = ring_ms + _COMPUTE_MS + overhead_ms
        values = [value for run in runs if run["network"] == network for value in run["itl_ms"]]
        summary |= {
            f"ring_ms_{network}": ring_ms,
            f"predicted_tpot_ms_{network}": predicted_ms,
            f"tpot_ms_{network}": measured[network],
            f"error_percent_{network}": 100 * (measured[network] / predicted_ms - 1),
            **percentiles(f"itl_ms_{network}", values),
        }
    return summary


if __name__ == "__main__":
    sys.exit(main())
