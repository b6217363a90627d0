"""A swarm that stands partly behind NAT: `geopetals serve` and `geopetals relay` on emulated hosts, and a client."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from geopetals.wan import HostSpec, LinkSpec, Nat, Wan, WanSpec
from tests.live.commands import wait_for

RTT_S = 0.04
HOSTS = (
    *(HostSpec(name=name) for name in ("client", "first", "second", "relay", "spare")),
    HostSpec(name="kept", nat=Nat.PORT_PRESERVING),
    HostSpec(name="changed", nat=Nat.SYMMETRIC),
)
PROMPT = [5, 6, 7, 8, 9]
NEW_TOKENS = 24
PAUSE_AFTER = 8
_CLIENT = """
import json, sys, time, torch
from transformers import StoppingCriteria, StoppingCriteriaList
from geopetals import AutoDistributedModelForCausalLM
from geopetals.swarm.circuits import links
from geopetals.swarm.relay_protocol import ping

directory, prompt, new_tokens, pause_after = sys.argv[1], *map(json.loads, sys.argv[2:])
ids = torch.tensor([prompt])
patient = {"max_retries": 12, "min_backoff": 0.05, "connect_timeout": 5.0, "ping_timeout": 1.0}

def tell(**fields):
    print(json.dumps(fields), flush=True)

async def measure(p2p, route):
    rtt_s = {}
    for peer in 3 * route:
        began = time.perf_counter()
        if await ping(p2p, peer, timeout_s=5.0):
            rtt_s[peer] = min(time.perf_counter() - began, rtt_s.get(peer, 5.0))
    return rtt_s, await links(p2p)

def facts(model, session):
    route = [hop.peer_id for hop in session.route]
    rtt_s, relayed = model.swarm.run(measure(model.swarm.network.p2p, route))
    return {
        "route": route,
        "rtt_s": rtt_s,
        "relayed": {peer: relayed[peer] for peer in route if peer in relayed},
        "using_relay": {server.peer_id: server.using_relay for server in model.swarm.servers},
    }

for line in sys.stdin:
    asked = json.loads(line)

    class InTheMiddle(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            if asked["pause"] and input_ids.shape[1] == len(prompt) + pause_after:
                tell(**facts(model, session))
                sys.stdin.readline()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    model = AutoDistributedModelForCausalLM.from_pretrained(
        directory, join=asked["token"], allowed_servers=asked["servers"], **patient
    )
    torch.manual_seed(7)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": True, "temperature": 1.5}
    with model.inference_session(max_length=len(prompt) + new_tokens) as session:
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=StoppingCriteriaList([InTheMiddle()]),
            top_k=0,
            **options,
        )
        tell(tokens=found[0].tolist(), **facts(model, session))
    model.close()
"""


class Program:
    """A Python program on a host, and what it writes; ended with everything it started."""

    def __init__(self, wan: Wan, host: str, folder: Path, *words: str | Path) -> None:
        self._log = folder / f"{host}.{len(list(folder.iterdir()))}.log"
        with self._log.open("wb") as log:
            self.process = wan.popen(
                host,
                [sys.executable, *words],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_line(self, pattern: str, *, times: int = 1, timeout_s: float = 90.0) -> str:
        """The group of the pattern, where it stands for the `times`-th time."""

        def search() -> str | None:
            found: list[str] = re.findall(pattern, self.text())
            if len(found) >= times:
                return found[times - 1]
            assert self.process.poll() is None, f"ended without {pattern!r}: {self.text()}"
            return None

        with contextlib.suppress(AssertionError):
            if found := wait_for(search, timeout_s=timeout_s, what=pattern):
                return found
        raise AssertionError(f"{pattern!r} not {times} times within {timeout_s:.0f} s in: {self.text()}")

    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """The whole process group, as a machine that fails."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        self.kill()


class Generation:
    """One session of the client, that may be held in the middle of its tokens."""

    def __init__(self, client: "subprocess.Popen[str]", swarm: "RelayedSwarm") -> None:
        self._client, self._swarm = client, swarm

    def facts(self) -> dict[str, Any]:
        """What the client says next: route, relayed, rtt_s, using_relay, and at the end tokens."""
        assert self._client.stdout is not None
        line = self._client.stdout.readline()
        assert line, f"the client has ended: {self._swarm.texts()}"
        found: dict[str, Any] = json.loads(line)
        return found

    def go_on(self) -> None:
        assert self._client.stdin is not None
        self._client.stdin.write("\n")
        self._client.stdin.flush()


class RelayedSwarm:
    """Servers, relays and one client process on hosts that are all 40 ms from each other."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self._programs: list[Program] = []
        self.servers: dict[str, Program] = {}
        self.relays: dict[str, Program] = {}
        self.peers: dict[str, str] = {}
        self.tokens: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._held = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpr-")))
            names = [host.name for host in HOSTS]
            links = {pair: LinkSpec(rtt_s=RTT_S) for pair in permutations(names, 2)}
            self.wan = stack.enter_context(Wan(WanSpec(hosts=HOSTS, links=links)))
            stack.callback(self._stop_all)
            self._client = stack.enter_context(self._start_client())
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def run(self, host: str, *words: str | Path) -> Program:
        """`geopetals WORDS` on a host."""
        program = Program(self.wan, host, self.folder, "-m", "geopetals", "--log-level", "debug", *words)
        self._programs.append(program)
        return program

    def serve(self, host: str, span: str, *words: str) -> None:
        """Start a server, and return; `wait_served` waits for it."""
        behind_nat = self.wan.addresses[host] != self.wan.own_addresses[host]
        address = "0.0.0.0" if behind_nat else self.wan.addresses[host]
        join = ["--join", self.tokens["first"]] if self.tokens else []
        options = ["--host", address, "--device", "cpu", "--dtype", "float32", "--blocks", span, *join, *words]
        self.servers[host] = self.run(host, "serve", self.model, "--dht-prefix", "tiny", *options)

    def wait_served(self, host: str) -> None:
        self.tokens[host] = self.servers[host].wait_line(r"generate --join (\S+)")
        self.peers[host] = self.servers[host].wait_line(r"(?m)^peer (\S+)$")

    def relay(self, host: str, *words: str, join: str = "first") -> None:
        """Start a relay with the identity that this host's had before, which ends, and wait until it relays."""
        if host in self.relays:
            self.relays[host].kill()
        identity = str(self.folder / f"{host}.key")
        token = ["--join", self.tokens[join]]
        arguments = ["--host", self.wan.addresses[host], "--identity", identity, *token, *words]
        self.relays[host] = self.run(host, "relay", *arguments)
        self.peers[host] = self.relays[host].wait_line(r"(?m)^peer (\S+)$")

    def generate(self, *hosts: str, join: str = "first", pause: bool = False) -> Generation:
        """Start a session over servers of these hosts alone."""
        return self.ask(self.tokens[join], [self.peers[host] for host in hosts], pause=pause)

    def ask(self, token: str, servers: list[str] | None, *, pause: bool) -> Generation:
        """Start a session over these servers alone; None are all."""
        assert self._client.stdin is not None
        self._client.stdin.write(json.dumps({"token": token, "servers": servers, "pause": pause}) + "\n")
        self._client.stdin.flush()
        return Generation(self._client, self)

    @contextlib.contextmanager
    def _start_client(self) -> Iterator["subprocess.Popen[str]"]:
        words = [self.model, json.dumps(PROMPT), json.dumps(NEW_TOKENS), json.dumps(PAUSE_AFTER)]
        with (
            (self.folder / "client.log").open("w") as log,
            self.wan.popen(
                "client",
                [sys.executable, "-c", _CLIENT, *words],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def texts(self) -> str:
        """What all programs have written."""
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in self.folder.glob("*.log"))

    def _stop_all(self) -> None:
        for program in self._programs:
            program.kill()
