"""Stock PETALS servers and clients as processes of their own, run by the Python of the stock environment."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-stock" / "bin" / "python"
STOCK_CACHE_TOKENS = 1024
_SCRIPTS = Path(__file__).with_name("stock")
_ADDRESS = re.compile(r"Running a server on \['(/ip4/127\.0\.0\.1/tcp/\d+/p2p/(\w+))'")
_START_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.1

Value = TypeVar("Value")


def wait_for(find: Callable[[], Value | None], what: str, timeout_s: float) -> Value:
    """The first result that is not None; raises TimeoutError that says what did not come."""
    deadline = time.monotonic() + timeout_s
    while (found := find()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(_POLL_S)
    return found


class StockProcess:
    """One process group. All that it writes stays in `folder`; `log` is what it prints, if `piped` on stderr alone."""

    def __init__(
        self,
        script: str | Path,
        arguments: Sequence[str],
        folder: Path,
        sockets: Path,
        *,
        piped: bool,
        python: Path = PYTHON,
        threads: int = 1,
    ) -> None:
        folder.mkdir(parents=True)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(python), str(_SCRIPTS / script), *arguments],
                cwd=folder,
                env=_environment(folder, sockets) | {"OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ask it to end as Ctrl-C does, then end what is left of its group: PETALS forgets children of its own."""
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


class StockServer(StockProcess):
    """`petals.cli.run_server` for blocks [start, end), started by `script`. Returns at once: see `wait_address()`."""

    def __init__(
        self,
        model: Path,
        span: tuple[int, int],
        *,
        prefix: str,
        peers: Sequence[str],
        folder: Path,
        sockets: Path,
        cache_tokens: int = STOCK_CACHE_TOKENS,
        script: str | Path = "serve.py",
        **process: Any,
    ) -> None:
        join = ["--initial_peers", *peers] if peers else ["--new_swarm"]
        options = {
            "--block_indices": f"{span[0]}:{span[1]}",
            "--dht_prefix": prefix,
            "--host_maddrs": "/ip4/127.0.0.1/tcp/0",
            "--device": "cpu",
            "--torch_dtype": "float32",
            "--throughput": "100",
            "--num_handlers": "2",
            "--attn_cache_tokens": str(cache_tokens),
        }
        flags = [word for option in options.items() for word in option]
        arguments = [str(model), *flags, "--no_auto_relay", *join]
        super().__init__(script, arguments, folder, sockets, piped=False, **process)

    def wait_address(self) -> str:
        """Its libp2p address; known before it has loaded its blocks."""
        return wait_for(lambda: self._find(1), f"address of a stock server in {self.log}", _START_TIMEOUT_S)

    @property
    def peer_id(self) -> str:
        return self._find(2) or ""

    def _find(self, group: int) -> str | None:
        if self.process.poll() is not None:
            raise RuntimeError(f"a stock server ended: {self.tail()}")
        found = _ADDRESS.search(self.log.read_text(errors="replace"))
        return found.group(group) if found else None


class StockClient(StockProcess):
    """A stock client (stock/client.py) that answers one command at a time."""

    def __init__(self, folder: Path, sockets: Path, **process: Any) -> None:
        super().__init__("client.py", [], folder, sockets, piped=True, **process)

    def do(self, what: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], _ANSWER_TIMEOUT_S)[0]:
            self.process.kill()
            raise TimeoutError(f"the stock client has not answered {what!r}: {self.tail()}")
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it has ended"}
        if "error" in answer:
            raise RuntimeError(f"the stock client failed at {what!r}: {answer['error']}\n{self.tail()}")
        return answer["result"]

    @contextlib.contextmanager
    def without_complaints(self, *, but_at_the_end: bool = False) -> Iterator[None]:
        """Fails if PETALS met an error inside, also one that it hides: a retry, or a session that closed badly.

        `but_at_the_end`: a session may close badly, as those on stock servers sometimes do.
        """
        seen = self.log.stat().st_size
        yield
        text = self.log.read_bytes()[seen:].decode(errors="replace")
        bad = r"Caught exception when" if but_at_the_end else r"Caught exception|BrokenPipe|Traceback"
        assert not re.search(bad, text), text[-5000:]

    def stop(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_TIMEOUT_S)
        super().stop()
        self.process.stdout.close()


def _environment(folder: Path, sockets: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "PETALS_"))}
    return kept | {
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "HIVEMIND_LOGLEVEL": "DEBUG",
        "PETALS_CACHE": str(folder),
        "PYTHONUNBUFFERED": "1",
        "STOCK_SOCKETS": str(sockets),
        "TMPDIR": str(folder),
    }
