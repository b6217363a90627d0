"""The coordinator towards people and programs: read-only JSON, server-sent events and Prometheus metrics.

Nothing that HTTP shows is secret among members, and nothing can be changed by it. On another address than loopback a
bearer token is asked for.
"""

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from geopetals import metrics, web
from geopetals.coordinator.admin import View, jsonable
from geopetals.coordinator.http_guard import GuardedProtocol
from geopetals.errors import NetworkError

log = logging.getLogger(__name__)

_STREAM_S = 1.0
_MAX_STREAMS = 64
_START_TIMEOUT_S = 10.0

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(view: View, *, token: str | None) -> Starlette:
    """`token` None lets everybody in who reaches the address."""
    streams = _Streams(view)

    async def health(request: Request) -> Response:
        return JSONResponse({"ok": True})

    async def status(request: Request) -> Response:
        return _json(view.status())

    async def plan(request: Request) -> Response:
        return await asyncio.to_thread(_json, await view.plan())  # of hundreds of servers, megabytes

    async def history(request: Request) -> Response:
        return _listing(request, view.history)

    async def sessions(request: Request) -> Response:
        return _listing(request, view.sessions)

    async def show_metrics(request: Request) -> Response:
        metrics.show_swarm(view.status())
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def events(request: Request) -> Response:
        if streams.count >= _MAX_STREAMS:
            return JSONResponse({"error": "too many streams are open"}, status_code=503)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(streams.follow(), media_type="text/event-stream", headers=headers)

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def answer(request: Request) -> Response:
            if not _may_read(request, token):
                headers = {"www-authenticate": "Bearer"}
                return JSONResponse({"error": "this needs the coordinator's --http-token"}, 401, headers)
            return await endpoint(request)

        return answer

    pages = {
        "/status": status,
        "/plan": plan,
        "/history": history,
        "/sessions": sessions,
        "/events": events,
        "/metrics": show_metrics,
    }
    return Starlette(
        routes=[*web.routes(), Route("/health", health), *(Route(path, guarded(page)) for path, page in pages.items())]
    )


class _Streams:
    """Server-sent events: `status` every second, and `decision` for each new entry of the history."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.count = 0

    async def follow(self) -> AsyncIterator[str]:
        self.count += 1
        try:
            known = max((entry["number"] for entry in self._view.history(1)), default=0)
            while True:
                yield _event("status", self._view.status())
                for entry in self._view.history(20):
                    if entry["number"] > known:
                        known = entry["number"]
                        yield _event("decision", jsonable(entry))
                await asyncio.sleep(_STREAM_S)
        finally:
            self.count -= 1


def _event(kind: str, value: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n"


def _listing(request: Request, read: Callable[[int], list[dict[str, Any]]]) -> Response:
    text = request.query_params.get("limit", "100")
    if not text.isdigit() or not 1 <= int(text) <= 1000:
        return JSONResponse({"error": "limit is a number from 1 to 1000"}, status_code=400)
    return _json({"items": read(int(text))})


def _json(value: Any) -> Response:
    return JSONResponse(jsonable(value))


def _may_read(request: Request, token: str | None) -> bool:
    if token is None:
        return True
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    return hmac.compare_digest(given, token.encode())


class HttpServer:
    """uvicorn on the loop of whoever starts it."""

    def __init__(self, app: Starlette, *, host: str, port: int) -> None:
        self._host, self._port = host, port
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=GuardedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        self._server = _Uvicorn(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """The address that answers. Raises NetworkError if it is taken."""
        self._task = asyncio.create_task(self._serve())
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not self._server.started:
                if self._task.done():
                    where = f"{self._host} port {self._port}"
                    raise NetworkError(f"cannot serve HTTP on {where}: is the port taken? choose another --http.")
                await asyncio.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{port}"

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._task, 5)

    async def _serve(self) -> None:
        try:
            await self._server.serve()
        except SystemExit:  # uvicorn's way of saying that it cannot listen
            log.debug("http.not_started")


class _Uvicorn(uvicorn.Server):
    """Signals are the business of the process, not of its HTTP server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield
