"""`python -m geopetals.bench.worker`: one host's client of a GeoPETALS swarm, see worker_loop.py.

Its first line: {"model", "join" or "initial_peers" and "dht_prefix", "options": {fields of ClientConfig}}.
"""

import time
from collections.abc import Mapping
from typing import Any

import geopetals
from geopetals.bench.worker_loop import Answer, Client, TokenTimes, serve


class GeoPetalsClient:
    """Sessions of the client library, one thread each."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        import torch

        from geopetals.client.model import AutoDistributedModelForCausalLM

        torch.set_num_threads(1)
        self._new_tensor = torch.tensor
        self._model = AutoDistributedModelForCausalLM.from_pretrained(
            config.get("model"),
            join=config.get("join"),
            initial_peers=config.get("initial_peers") or (),
            dht_prefix=config.get("dht_prefix"),
            **config.get("options", {}),
        )

    def facts(self) -> Mapping[str, Any]:
        return {
            "system": "geopetals",
            "version": geopetals.__version__,
            "vocabulary": int(self._model.config.vocab_size),
            "servers": [
                {
                    "peer_id": server.peer_id,
                    "start": server.start,
                    "end": server.end,
                    "throughput": server.throughput,
                    "inference_rps": server.inference_rps,
                    "emulated": server.emulated,
                }
                for server in self._model.swarm.servers
            ],
        }

    def generate(self, prompt: list[int], output_tokens: int, answer: Answer) -> None:
        ids = self._new_tensor([prompt])
        with self._model.inference_session(max_length=len(prompt) + output_tokens) as session:
            session.open(1)
            answer.opened = time.monotonic()
            self._model.generate(
                ids,
                do_sample=False,
                min_new_tokens=output_tokens,
                max_new_tokens=output_tokens,
                pad_token_id=0,
                streamer=TokenTimes(answer),
            )
            answer.chain = [(hop.peer_id, hop.start, hop.end) for hop in session.route]


def _open(config: Mapping[str, Any]) -> Client:
    return GeoPetalsClient(config)


if __name__ == "__main__":
    serve(_open)
