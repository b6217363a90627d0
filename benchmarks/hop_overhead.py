"""What does a hop cost in software per decoded token, beside computing, against stock PETALS?

Method. A Llama with one block per server, `--hops` servers on loopback, one thread each, one session with a batch of 1,
greedy, of a model that has no end of sequence. Time between tokens (ITL) is taken inside generate(), after the first
ten.

overhead_ms_per_hop        (ITL - computing of the blocks) / hops. All else is in it: the client library, generate()
                           with embeddings, head and sampling, messages, p2pd. Each server says how long its compute
                           thread was busy with the step (trace). The worse of both hidden sizes. Blocks have little
                           else than their hidden size: weights of megabytes would empty the processor's caches
                           between any two steps of a process, at the cost of all that comes after.
ratio_to_stock             The same by stock's, of the same model in the same rounds; its servers note how long their
                           steps are computed (stock/timed_serve.py). The worse of both hidden sizes. Stock knows only
                           heads that are as wide as the hidden states together: at 4096 that is another model
                           ("full"), whose blocks have 42 million parameters.
client, serialize, p2pd, thread, loop
                           Add up to overhead_ms_per_hop. `client` is generate() and the model's local parts, by hops.
                           The next three are measured alone (hop_parts.py): tensor and message to bytes and back; a
                           frame through two p2pd, on hops + 1 ways for so many hops; hand-off to the compute thread
                           and back. `loop` is what is left: event loops, sessions, threads that wait for a processor.

Rounds of ours and stock alternate.

    python benchmarks/hop_overhead.py [--quick] [--no-stock] [--stock-python FILE] [--hops N] [--out FILE]
"""

import argparse
import statistics
import struct
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from hop_parts import parts_of_a_hop
from provenance import percentiles, write_results
from transformers import LlamaConfig, StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).parents[1]))

from geopetals import AutoDistributedModelForCausalLM
from geopetals.swarm.local import LocalSwarm
from tests.interop import checkpoints
from tests.interop.mixed_swarm import Observer
from tests.interop.stock_processes import PYTHON, StockClient, StockServer, wait_for
from tests.models import VOCABULARY, save_model

HIDDEN_SIZES = (64, 4096)
HEAD_VALUES = {"64": 16, "4096": 4, "4096 full": 1024}
"""Models by name: hidden size, and how many values each of the four heads has."""
STOCK = ("64", "4096 full")
PROMPT = [[5, 6, 7, 8, 9]]
_WARM_UP = 10
_TIMED_SERVER = Path(__file__).with_name("stock") / "timed_serve.py"


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
    names = [name for name in HEAD_VALUES if name in map(str, HIDDEN_SIZES) or not args.no_stock]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hop-") as folder:
        models = {name: _save(Path(folder) / name.replace(" ", "-") / "llama", name, args.hops) for name in names}
        for number in range(rounds):
            for name, model in models.items():
                runs.append({"round": number, "who": "ours", "model": name, **_ours(model, args.hops, tokens)})
                _show(runs[-1])
                if name in STOCK and not args.no_stock:
                    where = Path(folder) / f"stock-{number}-{model.parent.name}"
                    measured = _stock(model, args.hops, tokens, where, args.stock_python)
                    runs.append({"round": number, "who": "stock", "model": name, **measured})
                    _show(runs[-1])
        parts = {size: parts_of_a_hop(models[str(size)]) for size in HIDDEN_SIZES}
    write_results(args.out, summary=_summary(runs, parts, args.hops), runs=runs, seed=0)
    return 0


def _save(directory: Path, name: str, layers: int) -> Path:
    """The older keys are there for stock: it knows no head_dim, and needs none where it is asked."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=int(name.split()[0]),
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=HEAD_VALUES[name],
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    save_model(directory, config)
    written = checkpoints._read_config(directory)
    del written["rope_parameters"]
    checkpoints._write_config(directory, {**written, "rope_theta": 10000.0, "rope_scaling": None})
    return directory


class _Clock(StoppingCriteria):
    """When each token was there; of a session, the trace of its step and how long generate() waited for that."""

    def __init__(self, session: Any = None) -> None:
        self._session = session
        self.at: list[float] = []
        self.traces: list[Any] = []
        self.steps_ms: list[float] = []
        if session is not None:
            step = session.step

            def timed(*arguments: Any, **options: Any) -> Any:
                began = time.perf_counter()
                output = step(*arguments, **options)
                self.steps_ms.append(1e3 * (time.perf_counter() - began))
                return output

            session.step = timed

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
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )


def _ours(directory: Path, hops: int, tokens: int) -> dict[str, Any]:
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
    first = _WARM_UP + 1
    itl_ms, traces = clock.itl_ms(), clock.traces[first:]
    sums = {name: [1e3 * sum(hop[place] for hop in trace) for trace in traces] for place, name in enumerate(_TRACE)}
    client = [itl - step for itl, step in zip(itl_ms, clock.steps_ms[first:], strict=True)]
    return {"itl_ms": itl_ms, "client_ms": client, **sums}


_TRACE = ("queue_ms", "compute_ms", "handling_ms")


def _stock(directory: Path, hops: int, tokens: int, folder: Path, python: Path) -> dict[str, Any]:
    folder.mkdir()
    with ExitStack() as held:
        sockets = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="s-")))
        peers = _start_stock(held, directory, hops, folder, sockets, python)
        client = StockClient(folder / "client", sockets, python=python)
        held.callback(client.stop)
        spec = {"directory": str(directory), "initial_peers": peers, "dht_prefix": "hop", "max_retries": 3}
        at = client.do("time", model=spec, prompt=PROMPT, tokens=tokens)
    steps = [_read_compute_ms(folder / f"server{block}" / "compute")[-tokens:] for block in range(hops)]
    itl_ms = [1e3 * (end - start) for start, end in zip(at[_WARM_UP:], at[_WARM_UP + 1 :], strict=False)]
    # The clock of its generate() is not asked after the last token.
    compute_ms = [sum(step) for step in zip(*steps, strict=True)][_WARM_UP + 1 :][: len(itl_ms)]
    return {"itl_ms": itl_ms, "compute_ms": compute_ms}


def _read_compute_ms(file: Path) -> list[float]:
    return [1e3 * seconds for (seconds,) in struct.iter_unpack("d", file.read_bytes())]


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
            script=_TIMED_SERVER,
        )
        held.callback(server.stop)
        peers = peers or (server.wait_address(),)
    observer = Observer(peers, "hop")
    held.callback(observer.close)
    wait_for(lambda: observer.all_online(hops), "stock servers online", 180.0)
    return peers


# -- results -----------------------------------------------------------------------------------------------------------


def _show(run: dict[str, Any]) -> None:
    medians = {name: round(statistics.median(values), 3) for name, values in run.items() if isinstance(values, list)}
    print({"round": run["round"], "who": run["who"], "model": run["model"], **medians}, flush=True)


def _summary(runs: list[dict[str, Any]], parts: dict[int, dict[str, float]], hops: int) -> dict[str, float]:
    summary: dict[str, float] = {"hops": hops}
    for size, alone in parts.items():
        costs = _overhead_ms(runs, "ours", str(size), hops)
        summary |= percentiles(f"overhead_ms_per_hop_{size}", costs)
        client = [cost for run in _of(runs, "ours", str(size)) for cost in run["client_ms"]]
        shares = {**alone, "client": statistics.median(client) / hops, "p2pd": alone["p2pd"] * (hops + 1) / hops}
        shares["loop"] = statistics.median(costs) - sum(shares.values())
        summary |= {f"{part}_ms_{size}": value for part, value in shares.items()}
    summary["overhead_ms_per_hop"] = max(summary[f"overhead_ms_per_hop_{size}_p50"] for size in parts)
    for name in STOCK:
        stock = _overhead_ms(runs, "stock", name, hops)
        if stock:
            hidden, stock_ms = name.split()[0], statistics.median(stock)
            ratio = statistics.median(_overhead_ms(runs, "ours", name, hops)) / stock_ms
            summary |= {f"stock_overhead_ms_per_hop_{hidden}": stock_ms, f"ratio_to_stock_{hidden}": ratio}
            summary["ratio_to_stock"] = max(ratio, summary.get("ratio_to_stock", 0.0))
    return summary


def _overhead_ms(runs: list[dict[str, Any]], who: str, model: str, hops: int) -> list[float]:
    return [
        (itl - compute) / hops
        for run in _of(runs, who, model)
        for itl, compute in zip(run["itl_ms"], run["compute_ms"], strict=True)
    ]


def _of(runs: list[dict[str, Any]], who: str, model: str) -> list[dict[str, Any]]:
    return [run for run in runs if run["who"] == who and run["model"] == model]


if __name__ == "__main__":
    sys.exit(main())
