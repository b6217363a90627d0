"""A Hugging Face Hub on loopback: enough of its HTTP interface for model_info and hf_hub_download."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves one directory as one repository. `downloads` are the files asked for; `cut` ones end half-way.

    `card` is what the model's card says of it.
    """

    def __init__(self, repo: str, directory: Path) -> None:
        self.repo = repo
        self.directory = directory
        self.downloads: list[str] = []
        self.cut: set[str] = set()
        self.card: dict[str, object] = {}

    def info(self) -> dict[str, object]:
        siblings = [{"rfilename": path.name} for path in sorted(self.directory.iterdir())]
        return {
            "id": self.repo,
            "modelId": self.repo,
            "sha": COMMIT,
            "siblings": siblings,
            "tags": [f"license:{self.card['license']}"] if "license" in self.card else [],
            "cardData": self.card,
            "private": False,
        }


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return None

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            base = f"api/models/{hub.repo}"
            if path in (base, f"{base}/revision/main", f"{base}/revision/{COMMIT}"):
                self._send(json.dumps(hub.info()).encode(), "application/json", body=body)
            elif path.startswith((f"{hub.repo}/resolve/main/", f"{hub.repo}/resolve/{COMMIT}/")):
                self._send_file(path.rpartition("/")[2], body=body)
            else:
                code = "RevisionNotFound" if path.startswith((base, hub.repo)) else "RepoNotFound"
                self._refuse(code)

        def _send_file(self, name: str, *, body: bool) -> None:
            file = hub.directory / name
            if not file.is_file():
                self._refuse("EntryNotFound")
                return
            if body:
                hub.downloads.append(name)
            self._send(file.read_bytes(), "application/octet-stream", body=body, cut=name in hub.cut)

        def _send(self, data: bytes, kind: str, *, body: bool, cut: bool = False) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = self.close_connection or cut

        def _refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@contextlib.contextmanager
def serving(hub: FakeHub, cache: Path) -> Iterator[FakeHub]:
    """While it runs, huggingface_hub of this process talks to `hub` and keeps its cache in `cache`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            endpoint = f"http://127.0.0.1:{server.server_port}"
            patch.setattr(constants, "ENDPOINT", endpoint)
            template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
