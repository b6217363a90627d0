"""Requests as OpenAI's clients send them, and what is refused."""

import json
import tracemalloc
from typing import Any

import pytest

from geopetals.errors import NoChain, ServerFull, ServerGone, UnsupportedInput
from geopetals.gateway.errors import ApiError, api_error
from geopetals.gateway.requests import ChatRequest, CompletionRequest, read_request


def chat(**fields: Any) -> ChatRequest:
    message = {"role": "user", "content": "hello"}
    return read_request(json.dumps({"model": "m", "messages": [message], **fields}).encode(), ChatRequest)


def completion(**fields: Any) -> CompletionRequest:
    return read_request(json.dumps({"model": "m", "prompt": "hello", **fields}).encode(), CompletionRequest)


def test_defaults_and_nulls_are_openais() -> None:
    for request in (chat(), chat(temperature=None, stop=None, max_tokens=None, tools=None, seed=None)):
        assert (request.temperature, request.top_p, request.n, request.limit) == (1.0, 1.0, 1, None)
        assert request.stops == ()
    assert completion().limit == 16


def test_parts_and_developers_become_plain_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}])
    assert [each.plain() for each in request.messages] == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "ab"},
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_come_in_four_forms(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 201}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    assert caught.value.param == param


def test_failures_of_the_swarm_have_their_status() -> None:
    full = api_error(ServerFull("full", free_in_s=7.2))
    assert (full.status, full.headers) == (429, {"Retry-After": "8"})
    assert api_error(ServerFull("full")).status == 429
    assert api_error(NoChain("blocks 3:5 have no server")).status == 503
    assert api_error(ServerGone("gone")).status == 503
    assert api_error(UnsupportedInput("no")).status == 400


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("top_k", 5, -1),
        ("min_p", 0.1, 0),
        ("repetition_penalty", 1.1, 1.0),
        ("min_tokens", 3, 0),
        ("ignore_eos", True, False),
        ("stop_token_ids", [2], []),
        ("tool_choice", "required", "none"),
        ("reasoning_effort", "high", None),
    ],
)
def test_what_would_change_the_answer_is_refused_by_its_name(name: str, value: Any, neutral: Any) -> None:
    with pytest.raises(ApiError, match=name) as caught:
        completion(**{name: value})
    assert (caught.value.status, caught.value.param) == (400, name)
    completion(**{name: neutral})


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [{}] * 200_000},
        {"prompt": [[{}] * 200_000]},
        {"stop": [1] * 200_000},
    ],
)
def test_the_first_mistake_of_very_many_is_enough(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", "prompt": "x", **fields}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(ApiError):
            read_request(body, CompletionRequest)
        assert tracemalloc.get_traced_memory()[1] < 100 * len(body)
    finally:
        tracemalloc.stop()


def test_messages_have_a_number() -> None:
    with pytest.raises(ApiError) as caught:
        chat(messages=[{"role": "user", "content": "x"}] * 5000)
    assert caught.value.param == "messages"


def test_all_refusals_are_the_clients_or_the_swarms() -> None:
    kinds = {status: ApiError(status, "x").envelope()["error"]["type"] for status in (400, 405, 408, 413, 500, 503)}
    assert kinds == {400: "invalid_request_error"} | dict.fromkeys((405, 408, 413), "invalid_request_error") | {
        500: "api_error",
        503: "service_unavailable",
    }
