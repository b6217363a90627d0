"""A client process without a swarm: `python fake_client.py`. What it does is in its first line, see FakeClient."""

import os
import time
from collections.abc import Mapping
from typing import Any

from geopetals.bench.worker_loop import Answer, Client, serve


class FakeClient:
    """Every token takes `token_s`. The first token of a prompt says what becomes of it: see generate()."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        if "refuses" in config:
            raise ValueError(config["refuses"])
        self._token_s: float = config.get("token_s", 0.0)
        self.seen: list[list[int]] = []

    def facts(self) -> Mapping[str, Any]:
        return {"system": "fake", "vocabulary": 50, "seen": self.seen, "servers": []}

    def generate(self, prompt: list[int], output_tokens: int, answer: Answer) -> None:
        self.seen.append(prompt)
        print("a library prints")
        match prompt[0]:
            case 1:
                raise TimeoutError("the swarm is slow")
            case 2:
                output_tokens -= 1
            case 3:
                time.sleep(60)
            case 4:
                os._exit(7)
        answer.opened = time.monotonic()
        for token in range(output_tokens):
            time.sleep(self._token_s)
            answer.times.append(time.monotonic())
            answer.tokens.append(token)


def _open(config: Mapping[str, Any]) -> Client:
    return FakeClient(config)


if __name__ == "__main__":
    serve(_open)
