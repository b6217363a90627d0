"""A client process that runs many sessions at once, as it is told line by line, and tells what becomes of each.

Told: {"id", "prompt", "tokens", "pause_at"?} to generate, {"go": id} to go on after a pause. Tells {"id", "event":
"paused" | "done" | "failed", ...}.
"""

import json
import sys
import threading
from typing import Any


class Client:
    """One model, connected; each session in a thread of its own."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._paused: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def obey(self, told: dict[str, Any]) -> None:
        if "go" in told:
            self._paused[told["go"]].set()
            return
        self._paused[told["id"]] = threading.Event()
        threading.Thread(target=self._run, args=(told,), daemon=True).start()

    def _run(self, told: dict[str, Any]) -> None:
        try:
            self._generate(told)
        except Exception as error:  # noqa: BLE001 - told to the test
            later_s = getattr(error, "retry_after_s", None)
            self._tell(told, "failed", kind=type(error).__name__, text=str(error), retry_after_s=later_s)

    def _generate(self, told: dict[str, Any]) -> None:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        ids, tokens, client = torch.tensor([told["prompt"]]), told["tokens"], self

        class InTheMiddle(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                if input_ids.shape[1] == ids.shape[1] + told.get("pause_at", -1):
                    client._tell(told, "paused", route=[hop.peer_id for hop in session.route])
                    client._paused[told["id"]].wait()
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        with self._model.inference_session(max_length=ids.shape[1] + tokens, output_tokens=tokens) as session:
            criteria = StoppingCriteriaList([InTheMiddle()])
            found = self._model.generate(ids, stopping_criteria=criteria, session=session, **options)
            ticket = session._lease.ticket.hex()
        self._tell(told, "done", tokens=found[0].tolist(), ticket=ticket)

    def _tell(self, told: dict[str, Any], event: str, **more: Any) -> None:
        with self._lock:
            print(json.dumps({"id": told["id"], "event": event, **more}), flush=True)


def main(arguments: list[str]) -> int:
    """MODEL TOKEN OPTIONS (of from_pretrained, as JSON)."""
    import argparse

    from geopetals import AutoDistributedModelForCausalLM
    from geopetals.cli import logs

    directory, token, options = arguments
    logs.configure(argparse.Namespace(log_level="debug", verbose=0))
    client = Client(AutoDistributedModelForCausalLM.from_pretrained(directory, join=token, **json.loads(options)))
    print(json.dumps({"event": "connected"}), flush=True)
    for line in sys.stdin:
        client.obey(json.loads(line))
    return 0
