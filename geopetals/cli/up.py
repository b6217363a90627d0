"""`geopetals up`: a whole swarm on this machine."""

import argparse
import signal
from types import FrameType
from typing import TYPE_CHECKING

from geopetals.cli import options
from geopetals.cli.api import add_http_arguments, api_keys
from geopetals.cli.serve import add_resource_arguments, emulated_device
from geopetals.errors import SwarmFailure
from geopetals.progress import Console
from geopetals.units import in_units

if TYPE_CHECKING:
    from geopetals.swarm.local import LocalServer, LocalSwarm

HELP = "start a whole swarm on this machine; Ctrl-C ends all of it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id or local directory")
    parser.add_argument(
        "--servers", type=options.positive_int, default=3, metavar="N", help="block servers (default: 3)"
    )
    add_resource_arguments(parser)
    group = parser.add_argument_group("OpenAI API")
    group.add_argument("--api", action="store_true", help="answer OpenAI's HTTP API, too")
    add_http_arguments(group)


def run(args: argparse.Namespace) -> int:
    from geopetals.bench.devices import describe_device
    from geopetals.swarm.local import LocalSwarm

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    if args.api:
        api_keys(args)  # before the swarm starts, which takes long
    device = emulated_device(args)
    swarm = LocalSwarm(
        args.model,
        revision=args.revision,
        reporter=Console(),
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        memory_bytes=args.memory,
        kv_cache_tokens=args.kv_cache_tokens,
        emulate=device.to_dict() if device is not None else None,
    )
    with swarm:
        swarm.start(servers=args.servers)
        print("\n".join(describe(server) for server in swarm.servers))
        if device is not None:
            print(f"EMULATED DEVICES, for benchmarks only: {describe_device(device)}")
        print(f'to generate text:\n  geopetals generate --join {swarm.token} "The sun rises in the"')
        print(
            f"to chat:\n  geopetals chat --join {swarm.token}\nCtrl-C ends the swarm",
            flush=True,
        )
        try:
            ended = _serve_api(args, swarm) if args.api else [swarm.wait_any_end()]
        except KeyboardInterrupt:
            return 0
        if not ended:
            return 0
    (server,) = ended
    name = "the whole swarm" if server is None else f"the server of blocks {server.start}:{server.end}"
    raise SwarmFailure(f"{name} has ended by itself: its messages are above.")


def _serve_api(args: argparse.Namespace, swarm: "LocalSwarm") -> "list[LocalServer | None]":
    """What has ended by itself and so the API with it; nothing after Ctrl-C."""
    from geopetals.cli.api import serve
    from geopetals.client.model import AutoDistributedModelForCausalLM
    from geopetals.join_token import JoinToken
    from geopetals.swarm.checkpoint import Checkpoint

    model = AutoDistributedModelForCausalLM.from_pretrained(args.model, join=swarm.token, revision=args.revision)
    try:
        tokenizer = Checkpoint.open(args.model, revision=args.revision).tokenizer()
        ended: list[LocalServer | None] = []
        name = JoinToken.decode(swarm.token).model
        has_ended = serve(args, model, tokenizer, name=name, until=lambda: ended.append(swarm.wait_any_end()))
        return ended if has_ended else []
    finally:
        model.close()


def describe(server: "LocalServer") -> str:
    return (
        f"server {server.number}: blocks {server.start}:{server.end}, weights {in_units(server.weights_bytes)}, "
        f"ready in {server.ready_s:.1f} s"
    )


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
