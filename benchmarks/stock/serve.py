"""`python -m petals.cli.run_server` of stock PETALS 2.2.0.post1 on an emulated device, in a closed network. Runs in
.venv-stock:

    serve.py TESTBED.json [arguments of run_server]

TESTBED.json: {"device": DeviceSpec or null, "network_bit_per_s": number or null, "believed": file, "turn": file or
null}. PETALS itself is not changed, but for what it meets at its borders:

* Every block that it makes, for its profiler as for its handlers, holds the emulated device while it computes: several
  blocks of one step follow one another, sessions are served one after another, as on a GPU that PETALS drives.
* Its own rule for the number of blocks counts the emulated device's memory (unless --num_blocks or --block_indices).
* Its speed test over the Internet gives the emulated link's figure; without one it fails, and PETALS takes its default.
* What it announces of itself (rps, round trips, free cache) is appended to `believed`, one JSON object a line.
* With a `turn` it measures itself when that file is there, and chooses its blocks without a random delay: servers can
  start together, and yet have the machine's cores to themselves when they measure, and choose one after another.
* It asks no package index for a newer version.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from borrowed import borrow_geopetals

borrow_geopetals()
from hivemind_names import keep_sockets_in, lend_hivemind_names  # noqa: E402

from geopetals.swarm.emulation import DeviceSpec, EmulatedDevice  # noqa: E402


def emulate_device(server: Any, throughput: Any, device: EmulatedDevice) -> None:
    """`server` and `throughput` are PETALS' modules."""
    convert_block = server.convert_block

    def convert(*arguments: Any, **options: Any) -> Any:
        block = convert_block(*arguments, **options)
        forward = block.forward

        def held(hidden: Any, *more: Any, **named: Any) -> Any:
            with device.hold(blocks=1, sessions=hidden.shape[0], tokens=hidden.shape[1]):
                return forward(hidden, *more, **named)

        block.forward = held
        return block

    server.convert_block = throughput.convert_block = convert


def emulate_memory(server: Any, memory_bytes: int) -> None:
    """PETALS has a rule for GPUs and for Apple's chips, none for CPUs: the second takes the machine's memory."""
    choose = server.Server._choose_num_blocks
    names = (
        "tensor_parallel_devices",
        "block_config",
        "torch_dtype",
        "quant_type",
        "_cache_bytes_per_block",
        "adapters",
    )

    def choose_as_on_a_gpu(self: Any) -> int:
        known = {name: getattr(self, name) for name in names}
        return int(choose(SimpleNamespace(device=SimpleNamespace(type="mps"), **known)))

    server.psutil = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(total=memory_bytes))
    server.Server._choose_num_blocks = choose_as_on_a_gpu


def emulate_link(throughput: Any, bit_per_s: float | None) -> None:
    def measured(pipe: Any) -> None:
        failed = {"exception": "there is no Internet here"}
        pipe.send(failed if bit_per_s is None else {"download": bit_per_s, "upload": bit_per_s})

    throughput._measure_bits_per_second = measured


def log_beliefs(server: Any, file: Path) -> None:
    declare = server.declare_active_modules

    def declare_and_log(dht: Any, uids: Any, info: Any, *more: Any, **options: Any) -> Any:
        belief = {"at": time.time(), "peer_id": dht.peer_id.to_base58(), **_jsonable(vars(info))}
        with file.open("a") as log:
            log.write(json.dumps(belief) + "\n")
        return declare(dht, uids, info, *more, **options)

    server.declare_active_modules = declare_and_log


def wait_for_turn(server: Any, file: Path) -> None:
    measure, choose = server.get_server_throughput, server.Server._choose_blocks

    def measure_in_turn(*arguments: Any, **options: Any) -> Any:
        while not file.exists():
            time.sleep(0.05)
        return measure(*arguments, **options)

    def choose_at_once(self: Any) -> Any:
        self.mean_block_selection_delay = 0
        return choose(self)

    server.get_server_throughput = measure_in_turn
    server.Server._choose_blocks = choose_at_once


def _jsonable(info: Mapping[str, Any]) -> dict[str, Any]:
    """PETALS has infinities for servers that do not answer, JSON has none."""
    pings = {peer: s if math.isfinite(s) else None for peer, s in (info.get("next_pings") or {}).items()}
    return {**info, "state": info["state"].name, "adapters": list(info.get("adapters") or ()), "next_pings": pings}


def main() -> None:
    settings = json.loads(Path(sys.argv.pop(1)).read_text())
    lend_hivemind_names()
    keep_sockets_in(tempfile.gettempdir())
    from petals.cli import run_server  # noqa: TID251 - the stock environment has no geopetals
    from petals.server import server, throughput  # noqa: TID251

    run_server.validate_version = lambda: None
    spec = DeviceSpec.from_dict(settings["device"]) if settings["device"] else None
    if spec is not None:
        emulate_device(server, throughput, EmulatedDevice(spec))
        if spec.memory_bytes is not None:
            emulate_memory(server, spec.memory_bytes)
    link, dilation = settings["network_bit_per_s"], 1.0 if spec is None else spec.dilation
    emulate_link(throughput, None if link is None else link / dilation)
    if settings.get("turn"):
        wait_for_turn(server, Path(settings["turn"]))
    log_beliefs(server, Path(settings["believed"]))
    run_server.main()


if __name__ == "__main__":
    main()
