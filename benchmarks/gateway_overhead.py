"""How much time does the HTTP API add to a token?

Method. A tiny Llama on two servers, `geopetals api` as a process of its own, all on loopback. In turn, `--rounds` times
each: the client library's generate() in this process, and the same prompt, greedy, through the API as a stream that a
bare socket reads, so that the reader's JSON does not count. TPOT is compared: last token less first, by the tokens
between them (a chunk may hold several: characters are only sent whole). `added_ms` is the difference of the medians.
Both run the same library on the same swarm.

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

_TOKENS, _PROMPT = 100, "a prompt of some words"


class _Gaps(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _library(model: Any, ids: torch.Tensor) -> float:
    gaps = _Gaps()
    options = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False}
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=gaps, **options)
    return _tpot_ms(gaps.times[1:])


def _api(url: str, ids: torch.Tensor) -> float:
    host, port = url.removeprefix("http://").split(":")
    prompt = ids[0].tolist()
    body = json.dumps(
        {"model": "tiny", "prompt": prompt, "max_tokens": _TOKENS, "temperature": 0, "stream": True, "logprobs": 0}
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    times: list[float] = []
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall((head + body).encode())
        while part := connection.recv(65536):
            times += [time.perf_counter()] * part.count(b'"text":')
    return _tpot_ms(times)


def _tpot_ms(times: list[float]) -> float:
    return 1000 * (times[-1] - times[0]) / (_TOKENS - 1)


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
                ids = torch.arange(5, 25)[None]
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
    }
    write_results(args.out, summary=summary, runs=runs, seed=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
