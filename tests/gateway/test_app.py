"""The gateway's answers, without a swarm: who may ask, what goes wrong, and that nothing is held for who is gone."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from geopetals import metrics
from geopetals.gateway.app import Gateway
from geopetals.gateway.engine import Engine, Limits
from tests.event_loop import in_loop
from tests.gateway.fakes import Bytes, Model, ask

WAIT_S = 20.0
HELLO: dict[str, Any] = {"model": "m", "prompt": "x", "temperature": 0, "max_tokens": 5}


@asynccontextmanager
async def gateway(
    model: Model, *, keys: tuple[str, ...] = (), limits: Limits | None = None
) -> AsyncIterator[tuple[Any, Engine]]:
    engine: Engine = Engine(model, Bytes(), names=["m"], limits=limits or Limits(running=2, waiting=3))  # type: ignore[arg-type]
    try:
        yield Gateway(engine, keys=keys).app(), engine
    finally:
        engine.close()
        await asyncio.to_thread(model.swarm.stop)


async def counted(path: str, status: int) -> float:
    value: float = metrics.API_REQUESTS.labels(path, str(status))._value.get()
    return value


@in_loop
async def test_an_answer_whole_and_streamed() -> None:
    async with gateway(Model()) as (app, _):
        status, body = await ask(app, "/v1/completions", HELLO)
        assert (status, json.loads(body)["choices"][0]["text"]) == (200, "hello")
        status, body = await ask(app, "/v1/completions", {**HELLO, "stream": True})
        assert status == 200
        assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_who_hangs_up_while_the_swarm_is_waited_for_ends_the_wait(stream: bool) -> None:
    model, hang_up = Model(blocks=True), asyncio.Event()
    async with gateway(model) as (app, engine):
        asking = asyncio.create_task(ask(app, "/v1/completions", {**HELLO, "stream": stream}, hang_up=hang_up))
        assert await asyncio.to_thread(model.waits.wait, WAIT_S)
        assert (engine.running, model.open_sessions) == (1, 1)
        hang_up.set()
        await asyncio.wait_for(asking, WAIT_S)
        assert (engine.running, model.open_sessions) == (0, 0)


@in_loop
async def test_answers_under_way_end_with_a_word_when_the_gateway_does() -> None:
    model = Model(blocks=True)
    async with gateway(model, limits=Limits(running=1, waiting=3)) as (app, engine):
        asking = [asyncio.create_task(ask(app, "/v1/completions", {**HELLO, "stream": True})) for _ in range(3)]
        assert await asyncio.to_thread(model.waits.wait, WAIT_S)
        engine.give_up()
        assert [status for status, _ in await asyncio.wait_for(asyncio.gather(*asking), WAIT_S)] == [503] * 3
        assert (engine.running, model.open_sessions) == (0, 0)


@in_loop
async def test_a_model_that_stops_without_an_end_is_an_error() -> None:
    async with gateway(Model("no")) as (app, _):  # two tokens of the five
        status, body = await asyncio.wait_for(ask(app, "/v1/completions", HELLO), WAIT_S)
        assert (status, json.loads(body)["error"]["code"]) == (503, "swarm_failure")


@in_loop
async def test_the_models_own_settings_do_not_change_answers() -> None:
    async with gateway(Model("\x07")) as (app, engine):
        assert engine._model.generation_config.repetition_penalty is None
        status, body = await ask(app, "/v1/completions", HELLO)
        assert status == 200
        assert json.loads(body)["choices"][0]["finish_reason"] == "stop"  # of its ends of an answer both are known


@in_loop
async def test_bugs_are_told_counted_and_end_a_stream() -> None:
    before = await counted("/v1/completions", 500), await counted("other", 404), await counted("other", 405)
    async with gateway(Model(failure=RuntimeError("secret"))) as (app, _):
        for stream in (False, True):
            status, body = await ask(app, "/v1/completions", {**HELLO, "stream": stream})
            assert (status, json.loads(body)["error"]["type"]) == (500, "api_error")
            assert b"secret" not in body
        assert (await ask(app, "/v1/embeddings", {}))[0] == 404
        status, body = await ask(app, "/v1/completions")
        assert (status, json.loads(body)["error"]["type"]) == (405, "invalid_request_error")
    after = await counted("/v1/completions", 500), await counted("other", 404), await counted("other", 405)
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 1, 1]


class Breaks(Bytes):
    """Fails in the middle of an answer."""

    def decode(self, tokens: Any, **_: object) -> str:
        if b"l" in bytes(tokens):
            raise RuntimeError("secret")
        return super().decode(tokens)


@in_loop
async def test_a_bug_in_the_middle_of_a_stream_is_its_last_event() -> None:
    model = Model()
    engine = Engine(model, Breaks(), names=["m"], limits=Limits())  # type: ignore[arg-type]
    try:
        status, body = await ask(Gateway(engine).app(), "/v1/completions", {**HELLO, "stream": True})
        events = body.split(b"\n\n")
        assert status == 200
        assert json.loads(events[-3].removeprefix(b"data: "))["error"]["type"] == "api_error"
        assert events[-2] == b"data: [DONE]"
    finally:
        engine.close()
        await asyncio.to_thread(model.swarm.stop)


@in_loop
async def test_more_choices_than_there_are_places_are_no_matter_of_waiting() -> None:
    async with gateway(Model()) as (app, _):
        status, body = await ask(app, "/v1/completions", {**HELLO, "n": 4})
        assert (status, json.loads(body)["error"]["param"]) == (400, "n")


@in_loop
async def test_keys_may_have_any_characters() -> None:
    async with gateway(Model(), keys=("clé à",)) as (app, _):
        for key, status in (("clé à".encode(), 200), (b"cl", 401), (b"\xff", 401), (None, 401)):
            assert (await ask(app, "/v1/models", key=key))[0] == status


@pytest.mark.parametrize("prompt", [b'"\\ud800"', b'"\xed\xa0\x80"', b'["\\udfff"]'])
@in_loop
async def test_half_a_character_is_a_bad_request(prompt: bytes) -> None:
    async with gateway(Model()) as (app, _):
        status, _ = await ask(app, "/v1/completions", b'{"model": "m", "prompt": ' + prompt + b"}")
        assert status == 400


@in_loop
async def test_metrics_tell_of_the_process_too() -> None:
    async with gateway(Model(), keys=("k",)) as (app, _):
        status, body = await ask(app, "/metrics")
        assert status == 200
        assert b"\nprocess_open_fds " in body
