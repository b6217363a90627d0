"""How much do sessions gain that decode at the same time: total tokens/s and time between tokens, 1 to 16 sessions?

Method. The demo's model (SmolLM2-135M-Instruct, 30 blocks, float32, CPU) on one server and on three (ten blocks each),
as many threads as cores, shared by the servers. Sessions have prompts of 32, 40, 48, ... tokens, so that all are at
other positions. Then each takes one decode step after another, as soon as the one before is answered, for some seconds
and at least ten steps; the first steps are left out. Their inputs are the embeddings of random tokens, known
beforehand; a step's answer is the hidden state after the last block. So the servers are measured, with the network and
the client's session. The LM head (49,152 x 576, about a quarter of all blocks' work per token) is left out: it runs at
the clients, each on a machine of its own in life, while here all sessions are threads of one process on the servers'
own cores. How many cores that process takes is written down (client_cores), and the CPU time that the servers take per
token, which says the same on a machine that is busy with other work. What the blocks alone take for such batches is
measured first, in this process (stage_alone_ms): efficiency is the tokens/s that this would allow, if all sessions were
always in one batch and nothing else took time, against those measured on one server.

Paired: the same client, with the same sessions, against stock PETALS servers in the same round (--no-stock leaves them
out). For our own servers the sizes of the decode batches are counted, as rpc_info tells them. A batch waits at most 20
ms, or half of what it takes, and only if that pays (geopetals/swarm/waiting_window.py); stock PETALS computes each
step alone.

    python benchmarks/concurrency.py [--quick] [--no-stock] [--stock-python FILE] [--out FILE] [--plot FILE]
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from provenance import percentiles, write_results

sys.path.insert(0, str(Path(__file__).parents[1]))

from geopetals import AutoDistributedModelForCausalLM
from geopetals.progress import Console
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.local import LocalSwarm, even_spans
from geopetals.swarm.smollm2 import demo_model_directory
from geopetals.swarm.stage import load_stage
from geopetals.swarm.wire import HANDLER
from tests.interop.stock_processes import PYTHON, StockServer

BLOCKS = 30
SESSIONS = (1, 2, 4, 8, 16)
SERVERS = (1, 3)
MAX_LENGTH = 1024
WARM_UP_STEPS = 3
OURS, STOCK = "ours", "stock"
_CACHE_TOKENS = MAX_LENGTH * max(SESSIONS) + MAX_LENGTH
_SEED = 0
_LEAST_STEPS = 10
_PATIENCE_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one short round instead of three")
    parser.add_argument("--no-stock", action="store_true", help="without stock PETALS")
    parser.add_argument("--stock-python", type=Path, default=PYTHON, help="stock environment (`make interop` makes it)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "concurrency.json")
    parser.add_argument("--threads", type=int, help="of each server (default: the machine's cores, shared equally)")
    parser.add_argument("--plot", type=Path, help="also draw total tokens/s over sessions")
    args = parser.parse_args()
    if not args.no_stock and not args.stock_python.exists():
        parser.error(f"no stock PETALS at {args.stock_python}: run `make interop`, or give --no-stock")
    model = demo_model_directory(Console())
    alone_s = _stage_alone_s(model, args.threads or os.cpu_count() or 1)
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for number in range(1 if args.quick else 3):
        for servers in SERVERS:
            for system in (OURS,) if args.no_stock else (OURS, STOCK):
                with _swarm(system, servers, model, args) as (remote, cpu_s):
                    for sessions in SESSIONS:
                        run = _measure(
                            remote, sessions, seconds=3.0 if args.quick else 8.0, counted=system == OURS, cpu_s=cpu_s
                        )
                        runs.append({"round": number, "system": system, "servers": servers, **run})
                        print({key: value for key, value in runs[-1].items() if key != "itl_s"}, flush=True)
    summary = _summary(runs) | _efficiency(runs, alone_s)
    write_results(args.out, summary=summary, runs=[_short(run) for run in runs], seed=_SEED)
    if args.plot is not None:
        _plot(args.plot, summary)
    return 0


# -- swarms --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _swarm(
    system: str, servers: int, model: Path, args: argparse.Namespace
) -> Iterator[tuple[Any, Callable[[], float]]]:
    """The model as a client of a new swarm has it, and the CPU seconds that the servers have used so far."""
    spans = even_spans(BLOCKS, servers)
    threads = args.threads or max(1, (os.cpu_count() or 1) // servers)
    with contextlib.ExitStack() as held:
        if system == OURS:
            local = held.enter_context(LocalSwarm(str(model), kv_cache_tokens=_CACHE_TOKENS, threads=threads))
            pids = [server.pid for server in local.start(spans=spans).servers]
            remote = AutoDistributedModelForCausalLM.from_pretrained(
                str(model), join=local.token, connect_timeout=_PATIENCE_S
            )
        else:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="s-")))
            stock = _start_stock(held, model, spans, folder, args.stock_python, threads)
            peers = [stock[0].wait_address()]
            pids = [server.process.pid for server in stock]
            remote = AutoDistributedModelForCausalLM.from_pretrained(
                str(model), initial_peers=peers, dht_prefix="stock", connect_timeout=_PATIENCE_S
            )
            _wait_until_served(remote)
        held.callback(remote.close)
        yield remote, lambda: sum(map(_cpu_s, pids))


def _cpu_s(pid: int) -> float:
    """Of a server's process and its children, p2pd among them."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(times.user + times.system for times in (member.cpu_times() for member in family))


def _start_stock(
    held: contextlib.ExitStack, model: Path, spans: list[tuple[int, int]], folder: Path, python: Path, threads: int
) -> list[StockServer]:
    servers: list[StockServer] = []
    for number, span in enumerate(spans):
        server = StockServer(
            model,
            span,
            prefix="stock",
            peers=[servers[0].wait_address()] if servers else [],
            folder=folder / f"server{number}",
            sockets=folder,
            cache_tokens=_CACHE_TOKENS,
            python=python,
            threads=threads,
        )
        held.callback(server.stop)
        servers.append(server)
    return servers


def _wait_until_served(remote: Any) -> None:
    deadline = time.monotonic() + 120.0
    while True:
        try:
            with remote.inference_session(max_length=4) as session:
                session.open(1)
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def _decode_batches(remote: Any, peer_ids: set[str]) -> Counter[int]:
    """Decode batches of all servers so far, by their sizes."""
    total: Counter[int] = Counter()
    for peer_id in peer_ids:
        call = remote.swarm.network.p2p.call_protobuf_handler(
            PeerID.from_base58(peer_id), f"{HANDLER}.rpc_info", runtime_pb2.ExpertUID(), runtime_pb2.ExpertInfo
        )
        info = MSGPackSerializer.loads(remote.swarm.run(call).serialized_info)
        total.update(dict(info["decode_batches"]))
    return total


def _stage_alone_s(model: Path, threads: int) -> dict[int, float]:
    """Median seconds of one decode step of all blocks, by the number of sessions in the batch."""
    torch.set_num_threads(threads)
    stage = load_stage(Checkpoint.open(str(model)), 0, BLOCKS, dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(_SEED)
    caches = []
    for number in range(max(SESSIONS)):
        caches.append(stage.allocate_kv(0, BLOCKS, batch=1, max_length=MAX_LENGTH))
        prompt = torch.randn(1, 32 + 8 * number, stage.hidden_size, generator=generator)
        stage.run(0.1 * prompt, 0, BLOCKS, kv=caches[-1])
    hidden = 0.1 * torch.randn(max(SESSIONS), 1, stage.hidden_size, generator=generator)

    def step_s(sessions: int) -> float:
        began = time.perf_counter()
        stage.decode(hidden[:sessions], 0, BLOCKS, caches[:sessions])
        return time.perf_counter() - began

    return {sessions: statistics.median(step_s(sessions) for _ in range(15)) for sessions in SESSIONS}


# -- measuring -----------------------------------------------------------------------------------------------------


class _Reader(threading.Thread):
    """One session: a prompt, then one step after another until `stop`."""

    def __init__(self, remote: Any, number: int, ready: threading.Barrier, stop: threading.Event) -> None:
        super().__init__(name=f"session-{number}")
        self._remote, self._number, self._ready, self._stop_now = remote, number, ready, stop
        self.times: list[float] = []
        self.peer_ids: set[str] = set()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._read()
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            self.error = error
            self._ready.abort()

    @torch.no_grad()
    def _read(self) -> None:
        generator = torch.Generator().manual_seed(_SEED + self._number)
        ids = torch.randint(0, self._remote.config.vocab_size, (1, MAX_LENGTH), generator=generator)
        inputs = self._remote.get_input_embeddings()(ids)
        position = 32 + 8 * self._number
        with self._remote.inference_session(max_length=MAX_LENGTH) as session:
            session.step(inputs[:, :position])
            self.peer_ids = {hop.peer_id for hop in session.route}
            for step in range(WARM_UP_STEPS):
                session.step(inputs[:, position + step : position + step + 1])
            position += WARM_UP_STEPS
            self._ready.wait()
            while not self._stop_now.is_set() and position < MAX_LENGTH:
                session.step(inputs[:, position : position + 1])
                self.times.append(time.perf_counter())
                position += 1


def _measure(
    remote: Any, sessions: int, *, seconds: float, counted: bool, cpu_s: Callable[[], float]
) -> dict[str, Any]:
    ready, stop = threading.Barrier(sessions + 1), threading.Event()
    readers = [_Reader(remote, number, ready, stop) for number in range(sessions)]
    for reader in readers:
        reader.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        ready.wait()
    peer_ids = set().union(*(reader.peer_ids for reader in readers))
    before = _decode_batches(remote, peer_ids) if counted else Counter[int]()
    server_cpu_s = cpu_s()
    began, cpu = time.perf_counter(), time.process_time()
    time.sleep(seconds)
    while any(len(reader.times) < _LEAST_STEPS and reader.is_alive() for reader in readers):
        time.sleep(0.1)
    ended, cpu = time.perf_counter(), time.process_time() - cpu
    server_cpu_s = cpu_s() - server_cpu_s
    after = _decode_batches(remote, peer_ids) if counted else Counter[int]()
    stop.set()
    for reader in readers:
        reader.join()
    for error in sorted(
        (r.error for r in readers if r.error), key=lambda e: isinstance(e, threading.BrokenBarrierError)
    ):
        raise error
    times = [[moment for moment in reader.times if began <= moment <= ended] for reader in readers]
    gaps = [later - earlier for own in times for earlier, later in itertools.pairwise(own)]
    return {
        "sessions": sessions,
        "tokens_per_s": sum(map(len, times)) / (ended - began),
        "fewest_tokens_of_a_session": min(map(len, times)),
        "client_cores": cpu / (ended - began),
        "server_cpu_ms_per_token": 1e3 * server_cpu_s / sum(map(len, times)),
        "batch_sizes": {str(size): count for size, count in sorted((after - before).items())},
        "itl_s": gaps,
    }


# -- results -------------------------------------------------------------------------------------------------------


def _summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for servers in SERVERS:
        for system in (OURS, STOCK):
            of_one = {run["round"]: run["tokens_per_s"] for run in _chosen(runs, system, servers, 1)}
            for sessions in SESSIONS:
                chosen = _chosen(runs, system, servers, sessions)
                if not chosen:
                    continue
                name = f"{system}_{servers}_servers_{sessions}_sessions"
                speedups = [run["tokens_per_s"] / of_one[run["round"]] for run in chosen]
                summary |= percentiles(f"{name}_tokens_per_s", [run["tokens_per_s"] for run in chosen])
                summary |= percentiles(f"{name}_itl_ms", [1e3 * gap for run in chosen for gap in run["itl_s"]])
                summary |= percentiles(f"{name}_speedup", speedups)
                cpu_ms = [run["server_cpu_ms_per_token"] for run in chosen]
                summary[f"{name}_server_cpu_ms_per_token"] = sum(cpu_ms) / len(cpu_ms)
                summary[f"{name}_client_cores"] = sum(run["client_cores"] for run in chosen) / len(chosen)
                if system == OURS:
                    summary[f"{name}_mean_batch"] = _mean_batch(chosen)
                else:
                    ours = summary[f"{OURS}_{servers}_servers_{sessions}_sessions_tokens_per_s_p50"]
                    summary[f"{servers}_servers_{sessions}_sessions_ratio_to_stock"] = (
                        ours / summary[f"{name}_tokens_per_s_p50"]
                    )
    return summary


def _efficiency(runs: list[dict[str, Any]], alone_s: dict[int, float]) -> dict[str, float]:
    summary = {f"stage_alone_ms_{sessions}_sessions": 1e3 * seconds for sessions, seconds in alone_s.items()}
    for sessions, seconds in alone_s.items():
        measured = statistics.median(run["tokens_per_s"] for run in _chosen(runs, OURS, 1, sessions))
        summary[f"{OURS}_1_servers_{sessions}_sessions_efficiency"] = measured * seconds / sessions
    return summary


def _chosen(runs: list[dict[str, Any]], system: str, servers: int, sessions: int) -> list[dict[str, Any]]:
    wanted = (system, servers, sessions)
    return [run for run in runs if (run["system"], run["servers"], run["sessions"]) == wanted]


def _mean_batch(runs: list[dict[str, Any]]) -> float:
    steps = sum(int(size) * count for run in runs for size, count in run["batch_sizes"].items())
    return steps / max(1, sum(count for run in runs for count in run["batch_sizes"].values()))


def _short(run: dict[str, Any]) -> dict[str, Any]:
    gaps = [1e3 * gap for gap in run["itl_s"]]
    return {key: value for key, value in run.items() if key != "itl_s"} | percentiles("itl_ms", gaps)


def _plot(file: Path, summary: dict[str, float]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for system in (OURS, STOCK):
        for servers in SERVERS:
            names = [f"{system}_{servers}_servers_{sessions}_sessions_tokens_per_s_p50" for sessions in SESSIONS]
            if all(name in summary for name in names):
                label = f"{'GeoPETALS' if system == OURS else 'stock PETALS'}, {servers} server(s)"
                axes.plot(SESSIONS, [summary[name] for name in names], marker="o", label=label)
    axes.set(xlabel="sessions at the same time", ylabel="tokens/s in all", xscale="log", xticks=SESSIONS)
    axes.set_xticklabels(map(str, SESSIONS))
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    sys.exit(main())
