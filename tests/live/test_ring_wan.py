"""Pushing servers on hosts of their own: the same tokens when a host, a server or the link between two fails."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.bench.our_server import OurServer, OurServerSpec
from geopetals.join_token import JoinToken
from geopetals.wan import Wan, WanSpec
from tests.live.wan_programs import why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

SPANS = {"a": (0, 3), "b": (3, 6), "c": (0, 3), "d": (3, 6)}
PROMPT = [5, 6, 7, 8, 9]
SAMPLING = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": True, "temperature": 1.5, "top_k": 0}
CLIENT = """
import json, sys, torch
from transformers import StoppingCriteria, StoppingCriteriaList
from geopetals import AutoDistributedModelForCausalLM

directory, token, prompt, options = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])

def tell(**fields):
    route = [(hop.peer_id, hop.mode) for hop in session.route]
    print(json.dumps({"route": route, **fields}), flush=True)

class InTheMiddle(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        if input_ids.shape[1] == len(prompt) + 8:
            tell()
            sys.stdin.readline()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

patient = {"max_retries": 8, "min_backoff": 0.05, "connect_timeout": 5.0, "ping_timeout": 1.0}
model = AutoDistributedModelForCausalLM.from_pretrained(directory, join=token, **patient)
torch.manual_seed(7)
ids = torch.tensor([prompt])
criteria = StoppingCriteriaList([InTheMiddle()])
with model.inference_session(max_length=len(prompt) + 24) as session:
    found = model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria, **options)
    tell(tokens=found[0].tolist())
model.close()
"""


class Swarm:
    """Two replicas of every block, each server on a host of its own, 20 ms from all others and the client."""

    def __init__(self, model: Path, wan: Wan) -> None:
        self.model, self.wan = model, wan
        self.servers: dict[str, OurServer] = {}
        self.hosts: dict[str, str] = {}
        self._tokens: dict[str, str] = {}

    @property
    def token(self) -> str:
        return next(iter(self._tokens.values()))

    def complete(self) -> None:
        """Start the servers that are missing."""
        missing = [host for host in SPANS if host not in self.servers]
        for host in missing:
            self._start(host)
            if not self._tokens:
                self._wait(host)
        for host in missing:
            self._wait(host)

    def stop(self, host: str) -> None:
        self._tokens.pop(host, None)
        self.servers.pop(host).stop()

    def stop_all(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.stop, list(self.servers)))

    def _start(self, host: str) -> None:
        spec = OurServerSpec(
            span=SPANS[host], address=self.wan.addresses[host], prefix=tuple(self.wan.prefix(host)), cache_tokens=4096
        )
        token = self.token if self._tokens else None
        self.servers[host] = OurServer(self.model, spec, swarm="tiny", token=token)

    def _wait(self, host: str) -> None:
        self._tokens[host] = token = self.servers[host].wait_token()
        for address in JoinToken.decode(token).peers:
            if f"/{self.wan.addresses[host]}/" in address:
                self.hosts[address.rpartition("/")[2]] = host


@pytest.fixture(scope="module")
def swarm(llama: Path) -> Iterator[Swarm]:
    with Wan(WanSpec.uniform(["client", *SPANS], rtt_s=0.02)) as wan:
        swarm = Swarm(llama, wan)
        try:
            yield swarm
        finally:
            swarm.stop_all()


class Generation:
    """One client process that pauses in the middle of its tokens."""

    def __init__(self, process: "subprocess.Popen[str]", swarm: Swarm) -> None:
        self._process, self._swarm = process, swarm
        self.tokens: list[int] = []

    def route(self) -> tuple[list[str], list[str]]:
        """Hosts and modes of its hops, as it says them next."""
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        self.tokens = said.get("tokens", [])
        return [self._swarm.hosts[peer] for peer, _ in said["route"]], [mode for _, mode in said["route"]]

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()


@contextlib.contextmanager
def generation(swarm: Swarm, log: Path) -> Iterator[Generation]:
    command = [sys.executable, "-c", CLIENT, str(swarm.model), swarm.token, json.dumps(PROMPT), json.dumps(SAMPLING)]
    with (
        log.open("w") as errors,
        swarm.wan.popen(
            "client", command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            yield Generation(process, swarm)
            assert process.wait(60) == 0
        finally:
            process.kill()


@contextlib.contextmanager
def failure(swarm: Swarm, kind: str, hosts: list[str]) -> Iterator[None]:
    """What fails, of a chain over two hosts; what can be mended is whole again afterwards."""
    first, second = hosts
    process = swarm.servers[second].process
    if kind in ("host", "link"):
        target = first if kind == "host" else f"{first}-{second}"
        swarm.wan.cut(target)
        try:
            yield
        finally:
            swarm.wan.heal(target)
    elif kind == "stopped":
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)
    else:
        process.kill()
        swarm.stop(second)
        yield


@pytest.mark.parametrize("kind", ["host", "link", "stopped", "killed"])
def test_tokens_of_the_local_model_whatever_fails(swarm: Swarm, local: Any, tmp_path: Path, kind: str) -> None:
    swarm.complete()
    with generation(swarm, tmp_path / "client.log") as client:
        before, modes = client.route()
        assert modes == ["push", "answer"]
        with failure(swarm, kind, before):
            client.go_on()
            after, modes = client.route()
    if kind == "link":  # both servers are as good as before, only not to each other
        assert (after, modes) == (before, ["relay", "answer"]) or (after != before and modes == ["push", "answer"])
    else:
        assert before[0 if kind == "host" else 1] not in after
        assert modes == ["push", "answer"]
    torch.manual_seed(7)
    ids = torch.tensor([PROMPT])
    assert client.tokens == local.generate(ids, attention_mask=torch.ones_like(ids), **SAMPLING)[0].tolist()
