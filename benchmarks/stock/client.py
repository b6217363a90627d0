"""One host's client of stock PETALS 2.2.0.post1, with its own routing, relaying and retries: see
geopetals/bench/worker_loop.py. Runs in .venv-stock.

Its first line: {"model", "initial_peers", "dht_prefix", "options": {fields of PETALS' ClientConfig}}.
"""

import json
import math
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from borrowed import borrow_geopetals

borrow_geopetals()
from hivemind_names import keep_sockets_in, lend_hivemind_names  # noqa: E402

lend_hivemind_names()
keep_sockets_in(tempfile.gettempdir())

import petals  # noqa: E402, TID251 - the stock environment has no geopetals
import torch  # noqa: E402
import transformers  # noqa: E402
from petals.client import inference_session  # noqa: E402, TID251

from geopetals.bench.worker_loop import Answer, Client, TokenTimes, serve  # noqa: E402
from geopetals.swarm.emulation import EMULATED_NAME, DeviceSpec  # noqa: E402

_current = threading.local()


class StockClient:
    """Sessions of PETALS' client, one thread each."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        torch.set_num_threads(1)
        _note_openings()
        self._model = petals.AutoDistributedModelForCausalLM.from_pretrained(
            config["model"],
            initial_peers=config["initial_peers"],
            dht_prefix=config["dht_prefix"],
            torch_dtype=torch.float32,
            **config.get("options", {}),
        ).eval()

    def facts(self) -> Mapping[str, Any]:
        """What PETALS believes: its servers with their throughputs, and the round trips that it measured."""
        manager = self._model.transformer.h.sequence_manager
        spans = list(manager.state.sequence_info.spans_by_priority)
        return {
            "system": "stock",
            "version": petals.__version__,
            "transformers": transformers.__version__,
            "vocabulary": int(self._model.config.vocab_size),
            "rtt_s": _finite({peer.to_base58(): s for peer, s in manager.ping_aggregator.to_dict().items()}),
            "servers": [
                {
                    "peer_id": span.peer_id.to_base58(),
                    "start": span.start,
                    "end": span.end,
                    "throughput": span.server_info.throughput,
                    "inference_rps": span.server_info.inference_rps,
                    "network_rps": span.server_info.network_rps,
                    "next_rtt_s": _finite(span.server_info.next_pings or {}),
                    "emulated": _emulated(span.server_info.public_name),
                }
                for span in spans
            ],
        }

    def generate(self, prompt: list[int], output_tokens: int, answer: Answer) -> None:
        _current.answer = answer
        with self._model.inference_session(max_length=len(prompt) + output_tokens) as session:
            self._model.generate(
                torch.tensor([prompt]),
                do_sample=False,
                min_new_tokens=output_tokens,
                max_new_tokens=output_tokens,
                pad_token_id=0,
                streamer=TokenTimes(answer),
            )
            spans = [part.span for part in session._server_sessions]
            answer.chain = [(span.peer_id.to_base58(), span.start, span.end) for span in spans]


def _note_openings() -> None:
    """PETALS reserves caches with the prompt. Noted is when the try that succeeded sent it; before lie failed ones."""
    step = inference_session._ServerInferenceSession.step

    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        if not self.stepped and not _current.answer.times and self.span.start == 0:
            _current.answer.opened = time.monotonic()
        return step(self, *arguments, **options)

    inference_session._ServerInferenceSession.step = noted


def _finite(rtts_s: Mapping[str, float]) -> dict[str, float | None]:
    """PETALS has infinities for servers that do not answer, JSON has none."""
    return {peer: rtt_s if math.isfinite(rtt_s) else None for peer, rtt_s in rtts_s.items()}


def _emulated(name: str | None) -> Mapping[str, Any] | None:
    if name is None or not name.startswith(EMULATED_NAME):
        return None
    try:
        return DeviceSpec.from_dict(json.loads(name.removeprefix(EMULATED_NAME))).to_dict()
    except (ValueError, AttributeError, TypeError):
        return None


def _open(config: Mapping[str, Any]) -> Client:
    return StockClient(config)


if __name__ == "__main__":
    serve(_open)
