"""Running one block server in this process until somebody ends it, and what the operator reads meanwhile."""

import asyncio
import os
import shlex
import signal
import sys

from geopetals.bench.devices import describe_device
from geopetals.client.runtime import new_event_loop
from geopetals.progress import Console
from geopetals.swarm.network import is_loopback
from geopetals.swarm.server import BlockServer
from geopetals.swarm.server_config import ReadyServer, ServerConfig
from geopetals.units import in_units


def serve_until_signal(config: ServerConfig, model: str) -> int:
    """0 after SIGTERM or SIGINT; raises GeoPetalsError if the server cannot start."""
    reporter = Console()
    if not is_loopback(config.host) and not config.is_coordinated:
        reporter.line(
            f"warning: listening on {config.host}: whoever reaches this port can use this server; "
            "swarms with a coordinator ask for tokens"
        )
    server = BlockServer(config, reporter, lambda ready: _tell(ready, config, model))
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_run(server))
    if not server.close():  # the compute thread is inside a long computation that nobody waits for
        sys.stdout.flush()
        os._exit(0)
    reporter.line("stopped")
    return 0


async def _run(server: BlockServer) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.run(stop)


def _tell(ready: ReadyServer, config: ServerConfig, model: str) -> None:
    lines = [
        f"serving blocks {ready.start}:{ready.end} of {ready.num_blocks}: weights {in_units(ready.weights_bytes)}, "
        f"attention cache up to {in_units(ready.kv_bytes)}, process {in_units(ready.process_bytes)}",
        f"peer {ready.peer_id}",
    ]
    if config.emulate is not None:
        lines.append(f"EMULATED DEVICE, for benchmarks only: {describe_device(config.emulate)}")
    if is_loopback(config.host):
        lines.append("this server is reachable from this machine only; --host 0.0.0.0 --public-ip IP opens it")
    if ready.token:
        lines += _invitation(ready.token, shlex.quote(model))
    print("\n".join(lines), flush=True)


def _invitation(token: str, model: str) -> list[str]:
    return [
        "to add a server, run on the next machine:",
        f"  geopetals serve {model} --join {token}",
        "to generate text:",
        f'  geopetals generate --join {token} "The sun rises in the"',
    ]
