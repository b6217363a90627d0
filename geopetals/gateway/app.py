"""The HTTP side: who may ask, how much at a time, and answers as a whole or as server-sent events."""

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import geopetals
from geopetals import metrics
from geopetals.gateway.answers import Chat, Choice, Completions, usage
from geopetals.gateway.engine import Engine
from geopetals.gateway.errors import ApiError
from geopetals.gateway.generation import Order
from geopetals.gateway.requests import AnyRequest, ChatRequest, CompletionRequest, read_request

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
_BODY_TIMEOUT_S = 30.0
_MOST_DISCARDED_BYTES = 64 * 2**20
_DONE = b"data: [DONE]\n\n"


class Gateway:
    """The routes of the API over one engine. Without keys anybody may ask."""

    def __init__(self, engine: Engine, *, keys: Sequence[str] = (), origins: Sequence[str] = ()) -> None:
        """`origins`: web pages that browsers may let ask, like the dashboard's."""
        self._engine, self._origins = engine, list(origins)
        self._keys = [key.encode() for key in keys]

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
            Route("/health", self._answered(self._health)),
            Route("/version", self._answered(self._version)),
            Route("/metrics", self._answered(self._metrics)),
        ]
        cors = Middleware(
            CORSMiddleware,
            allow_origins=self._origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
        return Starlette(
            routes=routes,
            middleware=[cors] if self._origins else [],
            exception_handlers={HTTPException: _http_error},
        )

    # -- routes --------------------------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._engine.names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._engine.names:
            raise ApiError(404, f"there is no model {name!r} here.", param="model", code="model_not_found")
        return JSONResponse(self._card(name))

    async def _health(self, request: Request) -> Response:
        await self._engine.health()
        return JSONResponse({"status": "ok"})

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": geopetals.__version__})

    async def _metrics(self, request: Request) -> Response:
        return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)

    async def _chat(self, request: Request) -> Response:
        asked = await asyncio.to_thread(read_request, await self._body(request), ChatRequest)
        return await self._generate(request, asked, Chat)

    async def _completions(self, request: Request) -> Response:
        asked = await asyncio.to_thread(read_request, await self._body(request), CompletionRequest)
        return await self._generate(request, asked, Completions)

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._engine.started_at, "owned_by": "geopetals"}

    # -- generating ----------------------------------------------------------------------------------------------------

    async def _generate(self, request: Request, asked: AnyRequest, form: type[Chat] | type[Completions]) -> Response:
        orders = await asyncio.to_thread(self._engine.orders, asked)
        self._engine.require_room(len(orders))
        answer = form(asked.model, self._engine.token_names, logprobs=asked.num_logprobs is not None)
        if not asked.stream:
            return JSONResponse(await _unless_gone(request, self._whole(asked, orders, answer)))
        events = self._events(asked, orders, answer)
        # The first event decides on the status: a swarm that is full or incomplete is no 200.
        first = await _unless_gone(request, anext(events))
        return _EventStream(_again(first, events))

    async def _whole(self, asked: AnyRequest, orders: list[Order], answer: Chat | Completions) -> dict[str, Any]:
        async def one(order: Order, choice: Choice) -> int:
            async with self._engine.generate(order) as generation:
                async for delta in self._engine.deltas(generation):
                    choice.add(delta)
                return generation.tokens

        choices = [Choice() for _ in orders]
        generated = sum(await _all(one(order, choice) for order, choice in zip(orders, choices, strict=True)))
        return answer.whole(choices, usage(orders, generated, choices=asked.n))

    async def _events(
        self, asked: AnyRequest, orders: list[Order], answer: Chat | Completions
    ) -> AsyncGenerator[bytes]:
        """Server-sent events. Choices come as they come, interleaved."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=len(orders))

        async def one(index: int, order: Order) -> int:
            async with self._engine.generate(order) as generation:
                opening = answer.first_chunk(index)
                async for delta in self._engine.deltas(generation):
                    if opening is not None:
                        await queue.put(_event(opening))
                        opening = None
                    await queue.put(_event(answer.chunk(index, delta)))
                return generation.tokens

        async def all_of_them() -> int:
            try:
                return sum(await _all(one(index, order) for index, order in enumerate(orders)))
            finally:
                await queue.put(None)

        work = asyncio.create_task(all_of_them())
        try:
            while (event := await queue.get()) is not None:
                yield event
            generated = await work
            if asked.wants_usage:
                yield _event(answer.last_chunk(usage(orders, generated, choices=asked.n)))
            yield _DONE
        finally:
            work.cancel()
            while not work.done():  # it may wait for room in the queue
                with contextlib.suppress(asyncio.QueueEmpty):
                    queue.get_nowait()
                await asyncio.wait([work], timeout=0.05)

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _body(self, request: Request) -> bytes:
        """Raises ApiError. Too much is read all the same, up to a limit: who is still sending hears no answer."""
        most, parts, size = self._engine.limits.body_bytes, list[bytes](), 0
        too_large = ApiError(413, f"the body is over the limit of {most} bytes.", code="body_too_large")
        if _announced(request) > _MOST_DISCARDED_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                async for part in request.stream():
                    size += len(part)
                    if size > _MOST_DISCARDED_BYTES:
                        raise too_large
                    if size <= most:
                        parts.append(part)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {_BODY_TIMEOUT_S:.0f} s.") from None
        if size > most:
            raise too_large
        return b"".join(parts)

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            self._check_key(request)
            return await handler(request)

        return self._answered(guarded)

    def _answered(self, handler: Handler) -> Handler:
        """Failures in OpenAI's envelope, and every answer counted."""

        async def answered(request: Request) -> Response:
            try:
                response = await handler(request)
            except ApiError as error:
                response = _error(error)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:  # noqa: BLE001 - strangers hear nothing of it
                response = _error(_bug(error))
            return _counted(request.scope["route"].path, response)

        return answered

    def _check_key(self, request: Request) -> None:
        if not self._keys:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # All are compared, each in constant time: how long it takes tells nothing of any of them.
        matches = [hmac.compare_digest(given.strip(" \t").encode("latin-1"), key) for key in self._keys]
        if kind.lower() != "bearer" or not any(matches):
            raise ApiError(401, "the API key is missing or wrong.", code="invalid_api_key")


class _EventStream(StreamingResponse):
    """Ends when its reader is gone."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        self._events = events
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        except (ExceptionGroup, ClientDisconnect) as error:
            log.info("reader.lost reason=%r", error)
        finally:
            await self._events.aclose()


async def _again(first: bytes, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """An error in the middle is the last event: the status has long been sent."""
    try:
        yield first
        async for event in events:
            yield event
    except Exception as error:  # noqa: BLE001 - whatever it is, the reader hears that it is over
        yield _event((error if isinstance(error, ApiError) else _bug(error)).envelope())
        yield _DONE
    finally:
        await events.aclose()


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`; it is cancelled when who asked has hung up. Raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _all(works: Any) -> list[int]:
    """Their results in order; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _announced(request: Request) -> int:
    """Bytes of the body as its sender says; 0 if it does not."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def _error(error: ApiError) -> Response:
    return JSONResponse(error.envelope(), status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """An unknown path, or a method that is not for it."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    code = "unknown_url" if error.status_code == 404 else None
    return _counted("other", _error(ApiError(error.status_code, message, code=code)))


def _counted(path: str, response: Response) -> Response:
    metrics.API_REQUESTS.labels(path, str(response.status_code)).inc()
    return response


def _bug(error: Exception) -> ApiError:
    """The traceback is in the log; strangers hear nothing of it."""
    log.error("request.failed", exc_info=error)
    return ApiError(500, "internal error: the gateway's log says more.", code="internal_error")
