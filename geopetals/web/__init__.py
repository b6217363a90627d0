"""The coordinator's dashboard: static files, served as they are."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # Nothing from elsewhere is loaded or run. The chat may talk to a gateway at any address that a person enters.
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' http: https:; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes() -> list[BaseRoute]:
    """The page at `/` and its parts below `/static`. They hold no facts, so that they need no token."""
    pages = _read()

    async def index(request: Request) -> Response:
        return pages["index.html"]

    async def static(request: Request) -> Response:
        return pages.get(request.path_params["name"]) or Response("not found", 404)

    return [Route("/", index), Route("/static/{name:path}", static)]


def _read() -> dict[str, Response]:
    """All files, once: what is asked for is never a path of this machine."""
    root = files("geopetals.web") / "static"
    found = {}
    for folder in ("", "js/"):
        for entry in (root / folder if folder else root).iterdir():
            kind = _KINDS.get(entry.name[entry.name.rfind(".") :])
            if entry.is_file() and kind is not None:
                found[folder + entry.name] = Response(entry.read_bytes(), media_type=kind, headers=_HEADERS)
    return found
