"""The dashboard in a headless browser, over a server that answers as a coordinator would."""

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from geopetals import web

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_TICK_S = 0.2


class FakeCoordinator:
    """Serves the page and `status`, which tests change while it runs. `token` None: everybody may read."""

    def __init__(self, status: dict[str, Any], *, token: str | None = None) -> None:
        self.status, self.token = status, token
        self.url = ""

    @contextmanager
    def running(self) -> Iterator["FakeCoordinator"]:
        routes = [*web.routes(), Route("/events", self._events), Route("/status", self._status)]
        server = _Server(uvicorn.Config(Starlette(routes=routes), port=0, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run)
        thread.start()
        server.started_event.wait(20)
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join(20)

    def _may_read(self, request: Request) -> bool:
        return self.token is None or request.headers.get("authorization") == f"Bearer {self.token}"

    async def _status(self, request: Request) -> Response:
        return JSONResponse(self.status) if self._may_read(request) else JSONResponse({}, 401)

    async def _events(self, request: Request) -> Response:
        if not self._may_read(request):
            return JSONResponse({}, 401)

        async def stream() -> AsyncIterator[str]:
            while True:
                yield f"event: status\ndata: {json.dumps(self.status)}\n\n"
                await asyncio.sleep(_TICK_S)

        return StreamingResponse(stream(), media_type="text/event-stream")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.started_event = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.started_event.set()


@contextmanager
def browser_page(**options: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page of a headless browser, and what its console complains of."""
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
            yield page, complaints
        finally:
            browser.close()
