"""A model, a tokenizer and a caller of ASGI applications, without a swarm."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig

from geopetals.client.runtime import LoopThread

VOCABULARY = 256


class Bytes:
    """A tokenizer of bytes."""

    chat_template = "yes"
    eos_token_id = 0

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=list(text.encode()))

    def decode(self, tokens: Any, **_: object) -> str:
        return bytes(tokens).decode(errors="replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<0x{token:02X}>"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> dict[str, list[int]]:
        return {"input_ids": list("".join(message["content"] for message in messages).encode())}


class Model:
    """Says `answer`, a byte each step; `blocks` makes it wait in the swarm for ever at its first step."""

    def __init__(self, answer: str = "hello", *, blocks: bool = False, failure: BaseException | None = None) -> None:
        self.generation_config = GenerationConfig(eos_token_id=[0, 7], repetition_penalty=9.0)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=10_000))
        self.device = torch.device("cpu")
        self.waits, self.open_sessions, self.called = threading.Event(), 0, 0
        self.swarm = LoopThread()
        self._answer, self._blocks, self._failure = answer, blocks, failure

    def get_input_embeddings(self) -> Any:
        return torch.nn.Embedding(VOCABULARY, 1)

    @contextmanager
    def inference_session(self, **_: object) -> Iterator[object]:
        self.open_sessions += 1
        try:
            yield object()
        finally:
            self.swarm.run(asyncio.sleep(0))  # a close() needs the swarm, too
            self.open_sessions -= 1

    def generate(self, ids: torch.Tensor, *, logits_processor: Any, stopping_criteria: Any, **_: object) -> None:
        self.called += 1
        if self._failure is not None:
            raise self._failure
        if self._blocks:
            self.waits.set()
            self.swarm.run(asyncio.Event().wait())
        for byte in self._answer.encode():
            logits = torch.full((1, VOCABULARY), -50.0)
            logits[0, byte] = 50.0
            logits_processor[0](ids, logits)
            if bool(stopping_criteria(ids, logits).all()):
                return


async def ask(
    app: Any, path: str, body: Any = None, *, key: bytes | None = None, hang_up: asyncio.Event | None = None
) -> tuple[int, bytes]:
    """Status and body of the answer; a GET where there is no `body` to post."""
    headers = [] if key is None else [(b"authorization", b"Bearer " + key)]
    scope = {
        "type": "http",
        "method": "GET" if body is None else "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "server": ("x", 80),
        "client": ("y", 1),
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    sent: list[dict[str, Any]] = []
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    came = iter([{"type": "http.request", "body": b"" if body is None else data, "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in came:
            return message
        await (hang_up or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
