"""How much time does the HTTP API add to a token?

Method. A tiny Llama on two servers, `geopetals api` as a process of its own, all on loopback. In turn, `--rounds` times
each: the client library's generate() in this process, and the same prompt, greedy, through the API as a stream that a
bare socket reads, so that the reader's JSON does not count. TPOT is compared: time from the first chunk to the last, by
the tokens that came after the first chunk (a chunk may hold several: characters are only sent whole). `added_ms` is the
difference of the medians, `added_paired_ms` the median of the differences of rounds. Both run the same library on the
same swarm.

    python benchmarks/gateway_overhead.py [--quick] [--out FILE]
"""

import argparse
import json
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import percentiles, write_results
from transformers.generation.streamers import BaseStreamer

sys.path.append(str(Path(__file__).parents[1]))
from geopetals import AutoDistributedModelForCausalLM
from geopetals.swarm.local import LocalSwarm
from tests.live.commands import Command
from tests.models import save_llama

_TOKENS = 100


class _Gaps(BaseStreamer):  # type: ignore[misc]
    """When the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _library(model: Any, ids: torch.Tensor) -> float:
    gaps = _Gaps()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), streamer=gaps, max_new_tokens=_TOKENS, do_sample=False
    )  # fmt: skip
    return _tpot_ms([(1, at) for at in gaps.times[1:]])


def _api(url: str, ids: torch.Tensor) -> float:
    host, port = url.removeprefix("http://").split(":")
    prompt = ids[0].tolist()
    body = json.dumps(
        {"model": "tiny", "prompt": prompt, "max_tokens": _TOKENS, "temperature": 0, "stream": True, "logprobs": 0}
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    parts: list[tuple[bytes, float]] = []
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall((head + body).encode())
        while part := connection.recv(65536):
            parts.append((part, time.perf_counter()))
    return _tpot_ms([(_tokens_in(part), at) for part, at in parts if _tokens_in(part)])


def _tokens_in(part: bytes) -> int:
    """A chunk lists its tokens, and is sent as one packet."""
    events = [line.removeprefix(b"data: ") for line in part.splitlines() if line.startswith(b"data: {")]
    return sum(len(json.loads(event)["choices"][0]["logprobs"]["tokens"]) for event in events)


def _tpot_ms(came: list[tuple[int, float]]) -> float:
    """Of how many tokens came when: the first ones are where the clock starts."""
    tokens = sum(count for count, _ in came)
    if tokens != _TOKENS:
        raise RuntimeError(f"{tokens} tokens instead of {_TOKENS}: the model has ended its answer, take another prompt")
    return 1000 * (came[-1][1] - came[0][1]) / (tokens - came[0][0])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gateway_overhead.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        model_folder = save_llama(Path(folder) / "llama")
        with LocalSwarm(str(model_folder)) as swarm:
            swarm.start(spans=[(0, 3), (3, 6)])
            command = Command(
                "api", "--join", swarm.token, "--model", model_folder, "--port", "0", "--served-model-name", "tiny"
            )
            model = AutoDistributedModelForCausalLM.from_pretrained(model_folder, join=swarm.token)
            try:
                url = command.wait_line(r"(http://\S+)/v1", timeout_s=120).group(1)
                ids = torch.arange(8, 28)[None]
                _library(model, ids)
                _api(url, ids)
                for number in range(3 if args.quick else args.rounds):
                    runs.append({"round": number, "library_ms": _library(model, ids), "api_ms": _api(url, ids)})
            finally:
                model.close()
                command.destroy()
    library, api = ([run[f"{name}_ms"] for run in runs] for name in ("library", "api"))
    summary = {
        **percentiles("library_tpot_ms", library),
        **percentiles("api_tpot_ms", api),
        "added_ms": statistics.median(api) - statistics.median(library),
        "added_paired_ms": statistics.median(one - other for one, other in zip(api, library, strict=True)),
    }
    write_results(args.out, summary=summary, runs=runs, seed=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
