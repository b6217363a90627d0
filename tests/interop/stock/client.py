"""A stock PETALS client that obeys: one JSON command on each line of its input, one JSON answer on each of its output.

Commands, by their "do": `ask` puts a question (questions.py) to a model; `hold` opens a session and makes one step,
`release` ends it; `time` times the tokens of a generation; `has_cache_for` asks PETALS' router; `close` leaves all
swarms. A model is named by its directory and, if it is to run in a swarm, by how to join that; each is opened at its
first use.
"""

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from hivemind_names import keep_sockets_in, lend_hivemind_names

lend_hivemind_names()
keep_sockets_in(os.environ["STOCK_SOCKETS"])
sys.path.append(str(Path(__file__).parents[1]))

import petals  # noqa: E402, TID251 - the stock environment has no geopetals
import questions  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


class Worker:
    def __init__(self) -> None:
        self._models: dict[str, Any] = {}
        self._held: list[Any] = []

    def obey(self, command: dict[str, Any]) -> Any:
        match command["do"]:
            case "versions":
                return {"transformers": transformers.__version__, "petals": petals.__version__}
            case "ask":
                return questions.ask(self._model(command["model"]), command["question"])
            case "hold":
                return self._hold(self._model(command["model"]), command["max_length"])
            case "release":
                self._held.pop().__exit__(None, None, None)
            case "has_cache_for":
                return _has_cache_for(self._model(command["model"]), command["tokens"])
            case "time":
                return _time(self._model(command["model"]), command["prompt"], command["tokens"])
            case "close":
                self._close()
            case other:
                raise ValueError(f"unknown command {other!r}")
        return None

    def _model(self, spec: dict[str, Any]) -> Any:
        key = json.dumps(spec, sort_keys=True)
        if key not in self._models:
            self._models[key] = _open(**spec)
        return self._models[key]

    def _hold(self, model: Any, max_length: int) -> list[tuple[str, int, int]]:
        """Returns the chain of the session: peer, first block, end block."""
        manager = model.inference_session(max_length=max_length)
        session = manager.__enter__()
        self._held.append(manager)
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7]]))
        spans = [part.span for part in session._server_sessions]
        return [(span.peer_id.to_base58(), span.start, span.end) for span in spans]

    def _close(self) -> None:
        for model in self._models.values():
            if hasattr(model, "transformer") and hasattr(getattr(model.transformer, "h", None), "sequence_manager"):
                manager = model.transformer.h.sequence_manager
                manager.shutdown()
                manager.dht.shutdown()
        self._models.clear()


def _open(directory: str, **swarm: Any) -> Any:
    """The local model, or, if `swarm` has options of PETALS' from_pretrained(), the distributed one."""
    kind = petals.AutoDistributedModelForCausalLM if swarm else transformers.AutoModelForCausalLM
    return kind.from_pretrained(directory, torch_dtype=torch.float32, **swarm).eval()


def _time(model: Any, prompt: list[list[int]], tokens: int) -> list[float]:
    """When each greedy token of generate() was there, by a clock in seconds."""
    times = []

    class Clock(transformers.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> bool:
            times.append(time.perf_counter())
            return False

    model.generate(
        torch.tensor(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([Clock()]),
    )
    return times


def _has_cache_for(model: Any, tokens: int) -> list[bool]:
    """What PETALS' router thinks of each server, in the order of their blocks."""
    manager = model.transformer.h.sequence_manager
    manager.make_sequence(mode="min_latency")
    spans = sorted(manager.state.sequence_info.spans_by_priority, key=lambda span: span.start)
    return [manager._has_cache_for(span, tokens) for span in spans]


def main(commands: TextIO, answers: TextIO) -> None:
    # PETALS' sessions close themselves in __del__, which waits for the event loop: for ever, if the garbage collector
    # runs in the thread of that loop. So it runs here alone.
    gc.disable()
    worker = Worker()
    for line in commands:
        try:
            answer = {"result": worker.obey(json.loads(line))}
        except Exception as error:  # noqa: BLE001 - the tests are told, and go on
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    worker.obey({"do": "close"})


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)  # whatever a library prints is no answer
        main(sys.stdin, stdout)
