"""Requests as OpenAI's clients send them, and what is refused."""

import json
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
