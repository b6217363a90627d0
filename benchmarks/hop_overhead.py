"""What does a hop cost in software per decoded token, beside computing, against stock PETALS?

Method. A Llama with one block per server, `--hops` servers on loopback, one thread each, one session with a batch of 1,
greedy. Time between tokens (ITL) is taken inside generate(), after the first ten tokens.

overhead_ms_per_hop        (ITL - computing of the blocks) / hops. All else is in it: the client library, generate()
                           with embeddings, head and sampling, messages, p2pd. Each server says how long its step took
                           from the event loop to the compute thread and back (trace); the hand-off to that thread,
                           measured apart as `thread`, is not taken for computing.
over_local_ms_per_hop      (ITL - ITL of the unmodified model in one process) / hops: a definition that needs to know
                           nothing of the servers, and so the one by which we are compared with stock.
ratio_to_stock             over_local_ms_per_hop of both, hidden size 64, in the same round.
serialize, thread, p2pd    Parts of a hop, measured alone: tensor and message to bytes and back; hand-off to the compute
                           thread and back; a frame through two p2pd, half a round trip. `loop` is what is left.

Rounds of ours and stock alternate. Blocks of hidden size 4096 have heads of 64 values in all, so that computing does
not drown the rest; stock's model classes cannot do that, hence the comparison at 64 alone.

    python benchmarks/hop_overhead.py [--quick] [--no-stock] [--stock-python FILE] [--hops N] [--out FILE]
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from provenance import percentiles, write_results
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).parents[1]))

from geopetals import AutoDistributedModelForCausalLM
from geopetals.client.runtime import new_event_loop
from geopetals.swarm.block_ops import StepInput
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.local import LocalSwarm
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.ring_messages import Step, Want
from geopetals.swarm.scheduler import Scheduler
from geopetals.swarm.stage import load_stage
from geopetals.swarm.wire import deserialize, frame, read_message, read_metadata, serialize
from tests.interop import checkpoints
from tests.interop.mixed_swarm import Observer
from tests.interop.stock_processes import PYTHON, StockClient, StockServer, wait_for
from tests.models import VOCABULARY, save_model

HIDDEN_SIZES = (64, 4096)
PROMPT = [[5, 6, 7, 8, 9]]
_WARM_UP = 10
_ECHO = "GeoPetals.benchmark_echo"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one short round instead of three")
    parser.add_argument("--no-stock", action="store_true")
    parser.add_argument("--stock-python", type=Path, default=PYTHON, help="stock environment (`make interop` makes it)")
    parser.add_argument("--hops", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hop_overhead.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.no_stock and not args.stock_python.exists():
        parser.error(f"no stock PETALS at {args.stock_python}: run `make interop`, or give --no-stock")
    rounds, tokens = (1, 100) if args.quick else (3, 400)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hop-") as folder:
        models = {size: _save(Path(folder) / f"h{size}" / "llama", size, args.hops) for size in HIDDEN_SIZES}
        for number in range(rounds):
            for size, model in models.items():
                runs.append({"round": number, "who": "ours", "hidden": size, **_ours(model, args.hops, tokens)})
                _show(runs[-1])
            if not args.no_stock:
                measured = _stock(models[64], args.hops, tokens, Path(folder) / f"stock{number}", args.stock_python)
                runs.append({"round": number, "who": "stock", "hidden": 64, **measured})
                _show(runs[-1])
        parts = {size: _parts(model) for size, model in models.items()}
    write_results(args.out, summary=_summary(runs, parts, args.hops), runs=runs, seed=0)
    return 0


def _save(directory: Path, hidden_size: int, layers: int) -> Path:
    """Heads of 64 values in all. The older keys are there for stock: it knows no head_dim, and at 64 needs none."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    save_model(directory, config)
    written = checkpoints._read_config(directory)
    del written["rope_parameters"]
    checkpoints._write_config(directory, {**written, "rope_theta": 10000.0, "rope_scaling": None})
    return directory


class _Clock(StoppingCriteria):
    """When each token was there, and the trace of its step."""

    def __init__(self, session: Any = None) -> None:
        self._session = session
        self.at: list[float] = []
        self.traces: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.at.append(time.perf_counter())
        if self._session is not None:
            self.traces.append(self._session.trace)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def itl_ms(self) -> list[float]:
        return [1e3 * (end - start) for start, end in zip(self.at[_WARM_UP:], self.at[_WARM_UP + 1 :], strict=False)]


def _generate(model: Any, tokens: int, clock: _Clock) -> None:
    ids = torch.tensor(PROMPT)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )


def _ours(directory: Path, hops: int, tokens: int) -> dict[str, Any]:
    local, model_of_local = _Clock(), AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    _generate(model_of_local, tokens, local)
    with LocalSwarm(str(directory)) as swarm:
        swarm.start(spans=[(block, block + 1) for block in range(hops)])
        model = AutoDistributedModelForCausalLM.from_pretrained(directory, join=swarm.token, trace=True)
        try:
            with model.inference_session(max_length=tokens + len(PROMPT[0])) as session:
                clock = _Clock(session)
                _generate(model, tokens, clock)
                modes = [hop.mode for hop in session.route]
        finally:
            model.close()
    if modes != ["push"] * (hops - 1) + ["answer"]:
        raise SystemExit(f"the hops of this chain are {modes}: this benchmark is of a ring")
    traces = clock.traces[_WARM_UP + 1 :]
    sums = {name: [1e3 * sum(hop[place] for hop in trace) for trace in traces] for place, name in enumerate(_TRACE)}
    return {"itl_ms": clock.itl_ms(), "local_itl_ms": local.itl_ms(), **sums}


_TRACE = ("queue_ms", "compute_ms", "pack_ms")


def _stock(directory: Path, hops: int, tokens: int, folder: Path, python: Path) -> dict[str, Any]:
    folder.mkdir()
    with ExitStack() as held:
        sockets = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="s-")))
        peers = _start_stock(held, directory, hops, folder, sockets, python)
        client = StockClient(folder / "client", sockets, python=python)
        held.callback(client.stop)
        spec = {"directory": str(directory), "initial_peers": peers, "dht_prefix": "hop", "max_retries": 3}
        timed = client.do("time", model=spec, prompt=PROMPT, tokens=tokens)
        local = client.do("time", model={"directory": str(directory)}, prompt=PROMPT, tokens=tokens)
    return {
        name: [1e3 * (end - start) for start, end in zip(at[_WARM_UP:], at[_WARM_UP + 1 :], strict=False)]
        for name, at in (("itl_ms", timed), ("local_itl_ms", local))
    }


def _start_stock(
    held: ExitStack, directory: Path, hops: int, folder: Path, sockets: Path, python: Path
) -> tuple[str, ...]:
    peers: tuple[str, ...] = ()
    for block in range(hops):
        server = StockServer(
            directory,
            (block, block + 1),
            prefix="hop",
            peers=peers,
            folder=folder / f"server{block}",
            sockets=sockets,
            python=python,
        )
        held.callback(server.stop)
        peers = peers or (server.wait_address(),)
    observer = Observer(peers, "hop")
    held.callback(observer.close)
    wait_for(lambda: observer.all_online(hops), "stock servers online", 180.0)
    return peers


# -- parts of a hop ----------------------------------------------------------------------------------------------------


def _parts(directory: Path) -> dict[str, float]:
    loop = new_event_loop()
    try:
        thread_ms = loop.run_until_complete(_thread_ms(directory))
        hidden = torch.zeros(1, 1, Checkpoint.open(str(directory)).config.hidden_size)
        return {
            "serialize": _serialize_ms(hidden),
            "thread": thread_ms,
            "p2pd": loop.run_until_complete(_p2pd_ms(hidden)),
        }
    finally:
        loop.close()


def _serialize_ms(hidden: torch.Tensor) -> float:
    """Hidden states to a message's bytes and back."""

    def once() -> None:
        metadata = Step(7, 100, Want.ALL).to_bytes()
        data = frame(runtime_pb2.ExpertRequest(tensors=[serialize(hidden)], metadata=metadata))
        message = runtime_pb2.ExpertRequest.FromString(data[9:])
        Step.read(read_metadata(message.metadata))
        deserialize(message.tensors[0])

    return _median_ms(once)


async def _thread_ms(directory: Path) -> float:
    """What a step costs more through the event loop and the scheduler than in the thread itself."""
    stage = load_stage(Checkpoint.open(str(directory)), 0, 1, dtype=torch.float32, device=torch.device("cpu"))
    compute = ComputeThread(asyncio.get_running_loop())
    scheduler = Scheduler(stage, compute)
    step = StepInput(hidden=torch.zeros(1, 1, stage.hidden_size), prompts=None, hypo_ids=None)
    costs = []
    try:
        kv = stage.allocate_kv(0, 1, batch=1, max_length=2000)
        inside: list[float] = []
        run = stage.run

        def timed(*arguments: Any, **options: Any) -> torch.Tensor:
            began = time.perf_counter()
            output = run(*arguments, **options)
            inside.append(time.perf_counter() - began)
            return output

        stage.run = timed  # type: ignore[method-assign]
        for _ in range(500):
            began = time.perf_counter()
            await scheduler.infer(kv, range(1), step)
            costs.append(1e3 * (time.perf_counter() - began - inside[-1]))
    finally:
        compute.stop()
    return statistics.median(costs)


async def _p2pd_ms(hidden: torch.Tensor) -> float:
    """Half a round trip of a step's frame between two processes' p2pd, on a stream that is kept."""
    server = await Network.start(NetworkConfig())
    client = await Network.start(NetworkConfig(initial_peers=await server.addresses(), client_only=True))

    async def echo(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (message := await read_message(reader, runtime_pb2.ExpertRequest, peer="")) is not None:
            writer.write(frame(message))

    try:
        await server.p2p.add_binary_stream_handler(_ECHO, echo)
        peer = PeerID.from_base58(server.peer_id)
        _, reader, writer = await client.p2p.call_binary_stream_handler(peer, _ECHO)
        data = frame(runtime_pb2.ExpertRequest(tensors=[serialize(hidden)], metadata=Step(7, 100, Want.ALL).to_bytes()))
        times = []
        for _ in range(500):
            began = time.perf_counter()
            writer.write(data)
            await reader.readexactly(len(data))
            times.append(1e3 * (time.perf_counter() - began) / 2)
        writer.close()
        return statistics.median(times)
    finally:
        await client.stop()
        await server.stop()


def _median_ms(function: Callable[[], object], repeats: int = 2000) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


# -- results -----------------------------------------------------------------------------------------------------------


def _show(run: dict[str, Any]) -> None:
    medians = {name: round(statistics.median(values), 3) for name, values in run.items() if isinstance(values, list)}
    print({"round": run["round"], "who": run["who"], "hidden": run["hidden"], **medians}, flush=True)


def _summary(runs: list[dict[str, Any]], parts: dict[int, dict[str, float]], hops: int) -> dict[str, float]:
    summary: dict[str, float] = {"hops": hops}
    medians: dict[int, float] = {}
    for size in HIDDEN_SIZES:
        ours = [run for run in runs if run["who"] == "ours" and run["hidden"] == size]
        thread = parts[size]["thread"]
        costs = [
            (itl - compute) / hops + thread
            for run in ours
            for itl, compute in zip(run["itl_ms"], run["compute_ms"], strict=False)
        ]
        summary |= percentiles(f"overhead_ms_per_hop_{size}", costs)
        summary |= {f"{part}_ms_{size}": value for part, value in parts[size].items()}
        medians[size] = statistics.median(costs)
        summary[f"loop_ms_{size}"] = medians[size] - sum(parts[size].values())
        summary[f"over_local_ms_per_hop_{size}"] = _over_local(ours, hops)
    summary["overhead_ms_per_hop"] = max(medians.values())
    stock = [run for run in runs if run["who"] == "stock"]
    if stock:
        summary["stock_over_local_ms_per_hop_64"] = _over_local(stock, hops)
        summary["ratio_to_stock"] = summary["over_local_ms_per_hop_64"] / summary["stock_over_local_ms_per_hop_64"]
    return summary


def _over_local(runs: list[dict[str, Any]], hops: int) -> float:
    rounds = [statistics.median(run["itl_ms"]) - statistics.median(run["local_itl_ms"]) for run in runs]
    return statistics.median(rounds) / hops


if __name__ == "__main__":
    sys.exit(main())
