"""The OpenAI client against `geopetals api` on a live swarm: a process of its own, real sockets."""

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
import psutil
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from geopetals.client.model import AutoDistributedModelForCausalLM
from geopetals.swarm.local import LocalSwarm
from tests.live.commands import Command, wait_for
from tests.live.conftest import TWO_STAGES, StartCommand
from tests.live.free_cache import wait_all_free

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

KEY, NAME = "a key for tests", "tiny"
READY_S = 60.0


class Api:
    """A gateway's process and a client of it."""

    def __init__(self, command: Command, url: str) -> None:
        self.command, self.url = command, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def get(self, path: str) -> str:
        with urlopen(self.url + path, timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def metric(self, name: str) -> float:
        """The sum over labels."""
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, found))

    def raw(self, request: bytes, *, until: bytes = b"\r\n\r\n") -> bytes:
        """Bytes as they are, in and out."""
        with self.connect() as connection:
            connection.sendall(request)
            received = b""
            while until not in received and (part := connection.recv(65536)):
                received += part
        return received

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=30)

    def post(self, path: str, body: bytes, *, headers: str = "") -> tuple[int, dict[str, Any]]:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n{headers}"
        with self.connect() as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            received = b""
            while part := connection.recv(65536):
                received += part
        top, _, answer = received.partition(b"\r\n\r\n")
        return int(top.split()[1]), json.loads(answer)


@pytest.fixture(scope="module")
def swarm(llama: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(str(llama)) as running:
        yield running.start(spans=TWO_STAGES)


@pytest.fixture(scope="module")
def api(swarm: LocalSwarm, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"another\n{KEY}\n")
    command = Command(
        "api", "--join", swarm.token, "--model", llama, "--port", "0", "--api-key-file", keys,
        "--served-model-name", NAME, "--max-running", "16", "--max-waiting", "4",
    )  # fmt: skip
    try:
        line = wait_for(
            lambda: next((line for line in command.out.lines if "http://" in line), ""),
            timeout_s=READY_S,
            what=lambda: f"the gateway's address, but {command.err.text}",
        )
        yield Api(command, line.split("http://")[1].split("/v1")[0].join(["http://", ""]))
    finally:
        command.destroy()


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama)


def local_text(local: Any, tokenizer: Any, ids: list[int], tokens: int) -> str:
    """What the unmodified model answers, greedily."""
    inputs = torch.tensor([ids])
    output = local.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False)
    text: str = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return text


def test_models_are_listed(api: Api) -> None:
    assert [model.id for model in api.client.models.list()] == [NAME]
    assert api.client.models.retrieve(NAME).owned_by == "geopetals"
    assert json.loads(api.get("/health")) == {"status": "ok"}
    assert "version" in json.loads(api.get("/version"))


def test_a_completion_is_the_local_models(api: Api, local: PreTrainedModel, tokenizer: Any) -> None:
    prompt = "Once upon a time"
    answer = api.client.completions.create(model=NAME, prompt=prompt, max_tokens=20, temperature=0)
    ids = tokenizer(prompt).input_ids
    assert answer.choices[0].text == local_text(local, tokenizer, ids, 20)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 20
    assert answer.choices[0].finish_reason == "length"


def test_a_chat_is_the_local_models_whole_and_streamed(api: Api, local: PreTrainedModel, tokenizer: Any) -> None:
    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "How are you?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = local_text(local, tokenizer, ids, 24)
    whole = api.client.chat.completions.create(model=NAME, messages=messages, max_tokens=24, temperature=0)
    assert whole.choices[0].message.content == expected
    chunks = list(
        api.client.chat.completions.create(
            model=NAME, messages=messages, max_completion_tokens=24, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24


def test_sampling_is_repeated_by_its_seed_while_others_sample(api: Api) -> None:
    def sample(seed: int) -> str:
        answer = api.client.completions.create(model=NAME, prompt="abc", max_tokens=30, temperature=1.0, seed=seed)
        return answer.choices[0].text

    with ThreadPoolExecutor(6) as threads:
        texts = list(threads.map(sample, [1, 2, 3, 1, 2, 3]))
    assert texts[:3] == texts[3:]
    assert len(set(texts)) == 3


def test_sixteen_streams_at_once(api: Api, local: PreTrainedModel, tokenizer: Any) -> None:
    prompts = [f"story number {number}" for number in range(16)]

    def stream(prompt: str) -> str:
        chunks = api.client.completions.create(model=NAME, prompt=prompt, max_tokens=16, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(stream, prompts))
    assert found == [local_text(local, tokenizer, tokenizer(prompt).input_ids, 16) for prompt in prompts]


def test_stop_texts_end_an_answer(api: Api) -> None:
    whole = api.client.completions.create(model=NAME, prompt="xyz", max_tokens=30, temperature=0).choices[0].text
    stop = whole[8:11]
    cut = api.client.completions.create(model=NAME, prompt="xyz", max_tokens=30, temperature=0, stop=[stop, "☃"])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_penalties_change_an_answer_as_they_would_the_local_models(
    api: Api, local: PreTrainedModel, tokenizer: Any
) -> None:
    ids = tokenizer("abab").input_ids
    chosen: list[int] = []
    for _ in range(24):
        inputs = torch.tensor([ids + chosen])
        with torch.no_grad():
            logits = local(inputs, attention_mask=torch.ones_like(inputs)).logits[0, -1]
        for token in set(chosen):
            logits[token] -= 1.5 * chosen.count(token) + 0.5
        chosen.append(int(logits.argmax()))
    answer = api.client.completions.create(
        model=NAME, prompt="abab", max_tokens=24, temperature=0, frequency_penalty=1.5, presence_penalty=0.5
    )
    assert answer.choices[0].text == tokenizer.decode(chosen, skip_special_tokens=True)


def test_choices_of_a_stream_come_side_by_side(api: Api) -> None:
    chunks = api.client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "x"}], n=2, seed=5, max_tokens=6, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts, ends, used = ["", ""], set[int](), 0
    for chunk in chunks:
        used = chunk.usage.completion_tokens if chunk.usage is not None else used
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason is not None:
                ends.add(choice.index)
    assert ends == {0, 1}
    assert texts[0] != texts[1]
    assert used == 12


def test_several_choices_and_prompts(api: Api) -> None:
    answer = api.client.completions.create(
        model=NAME, prompt=["one", "two"], n=2, max_tokens=5, temperature=1.0, seed=3, logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.token_logprobs or []) == 5
        assert all(value is not None and value <= 0 for value in choice.logprobs.token_logprobs or [])
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6


def test_logprobs_of_a_chat(api: Api) -> None:
    answer = api.client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "x"}], max_tokens=4, temperature=0, logprobs=True,
        top_logprobs=3,
    )  # fmt: skip
    content = answer.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    for token in content.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy


def test_a_reader_who_hangs_up_frees_the_cache(
    api: Api, swarm: LocalSwarm, llama: Path, local: Any, tokenizer: Any
) -> None:
    ids = torch.tensor([tokenizer("w").input_ids])
    written = local.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, do_sample=False)
    assert written.shape[1] == ids.shape[1] + 256  # the model does not end it by itself
    before = api.metric("geopetals_generation_tokens_total")
    stream = api.client.completions.create(model=NAME, prompt="w", max_tokens=256, temperature=0, stream=True)
    next(iter(stream))
    assert api.metric("geopetals_num_requests_running") == 1
    stream.close()
    wait_for(
        lambda: api.metric("geopetals_num_requests_running") == 0,
        timeout_s=20,
        what="the end of an answer nobody reads",
    )
    assert api.metric("geopetals_generation_tokens_total") - before < 200
    watcher = AutoDistributedModelForCausalLM.from_pretrained(llama, join=swarm.token)
    try:
        wait_all_free(watcher, swarm.servers, timeout_s=30)
    finally:
        watcher.close()


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"[" * 100_000, 400, None),
        (b'{"model": "tiny"}', 400, "prompt"),
        (b'{"model": "another", "prompt": "x"}', 404, "model"),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": -1}', 400, "max_tokens"),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": 100000000}', 400, "max_tokens"),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": 1e99}', 400, "max_tokens"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": "x", "temperature": "hot"}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": ""}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": [99999999]}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": "x", "stop": ["a","b","c","d","e"]}', 400, "stop"),
        (b'{"model": "tiny", "prompt": "x", "logit_bias": {"5": 100}}', 400, "logit_bias"),
        (b'{"model": "tiny", "prompt": "x", "stream_options": {"include_usage": true}}', 400, "stream_options"),
    ],
)  # fmt: skip
def test_bad_requests_are_told_what_is_wrong(api: Api, body: bytes, status: int, param: str | None) -> None:
    found, answer = api.post("/v1/completions", body)
    assert found == status, answer
    assert answer["error"]["param"] == param
    assert answer["error"]["message"]


def test_wrong_keys_and_paths(api: Api) -> None:
    stranger = openai.OpenAI(base_url=f"{api.url}/v1", api_key="guess", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="key"):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError):
        api.client.models.retrieve("another")
    status, answer = api.post("/v1/embeddings", b"{}")
    assert status == 404
    assert answer["error"]["code"] == "unknown_url"


def test_large_bodies_are_refused_unread(api: Api) -> None:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 999999999\r\n\r\n"
    )
    assert api.raw(head.encode()).startswith(b"HTTP/1.1 413")
    status, _ = api.post("/v1/completions", b'{"model": "tiny", "prompt": "' + b"x" * (3 * 2**20) + b'"}')
    assert status == 413


def test_who_comes_when_all_is_taken_hears_when_to_come_again(api: Api) -> None:
    with ThreadPoolExecutor(40) as threads:

        def ask(number: int) -> openai.RateLimitError | None:
            try:
                api.client.completions.create(model=NAME, prompt="x" * number, max_tokens=60, temperature=0)
            except openai.RateLimitError as error:
                return error
            return None

        refused = [error for error in threads.map(ask, range(1, 41)) if error is not None]
    assert refused
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)
    assert api.client.completions.create(model=NAME, prompt="x", max_tokens=1).choices[0].text is not None


def test_idle_connections_and_half_requests_keep_nobody_out(api: Api) -> None:
    connections = [api.connect() for _ in range(1000)]
    try:
        for connection in connections[:300]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
        assert api.client.completions.create(model=NAME, prompt="x", max_tokens=2).usage is not None
    finally:
        for connection in connections:
            connection.close()


def test_curl(api: Api, local: PreTrainedModel, tokenizer: Any) -> None:
    body = json.dumps({"model": NAME, "prompt": "curl", "max_tokens": 5, "temperature": 0})
    done = subprocess.run(
        ["curl", "-sS", f"{api.url}/v1/completions", "-H", f"Authorization: Bearer {KEY}", "-d", body],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["choices"][0]["text"] == local_text(local, tokenizer, tokenizer("curl").input_ids, 5)


def test_missing_blocks_are_503_until_they_are_back(swarm: LocalSwarm, api: Api) -> None:
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 2}'

    def error() -> str:
        status, answer = api.post("/v1/completions", body)
        return str(answer["error"]["message"]) if status == 503 else ""

    swarm.kill(swarm.servers[1])
    assert "blocks" in wait_for(error, timeout_s=60, what="an error that says which blocks are missing")
    swarm.add(TWO_STAGES[1])
    wait_for(lambda: api.post("/v1/completions", body)[0] == 200, timeout_s=60, what="an answer again")


def test_no_secret_is_in_the_log(api: Api) -> None:
    assert KEY not in api.command.err.text + api.command.out.text
    assert "Traceback" not in api.command.err.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_swarm_with_its_api_ends_by_a_signal(llama: Path, start_command: StartCommand, number: int) -> None:
    command = start_command("up", llama, "--servers", "2", "--api", "--port", "0")
    url = command.wait_line(r"(http://\S+)/v1").group(1)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        assert client.completions.create(model=model, prompt="x", max_tokens=3).usage is not None
    command.signal(number)
    assert command.wait() == 0
    command.assert_nothing_left()


def test_a_swarm_with_its_api_notices_that_a_server_has_ended(llama: Path, start_command: StartCommand) -> None:
    command = start_command("up", llama, "--servers", "2", "--api", "--port", "0")
    command.wait_line(r"(http://\S+)/v1")
    daemon = min(command.daemons())  # a server does not outlive its p2pd; the API's own would be another failure
    server = next(parent.pid for parent in psutil.Process(daemon).parents() if parent.pid != daemon)
    assert server != command.pid
    os.kill(server, signal.SIGKILL)
    assert command.wait() == 1
    assert "has ended by itself" in command.err.text
    command.assert_nothing_left()
