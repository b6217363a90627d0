"""`geopetals api`: the OpenAI-compatible HTTP API of a swarm."""

import argparse
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from geopetals.cli import options
from geopetals.cli.generate import add_swarm_arguments, open_model
from geopetals.errors import NetworkError, UnsupportedInput

HELP = "answer OpenAI's HTTP API with a model that a swarm serves"
_KEY_VARIABLE = "GEOPETALS_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_swarm_arguments(parser)
    add_http_arguments(parser)


def add_http_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=options.port, default=8000, help="TCP port (default: 8000; 0 takes a free one)")
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"ask for this key; may be given several times (default: those in {_KEY_VARIABLE}, separated by commas)",
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="a file with one key in each line")
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page that may ask from a browser, like http://127.0.0.1:8470 of the dashboard",
    )
    parser.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="name in the API (default: the model's)",
    )
    parser.add_argument(
        "--max-running", type=options.positive_int, default=16, metavar="N", help="answers at a time (default: 16)"
    )
    parser.add_argument(
        "--max-waiting", type=options.positive_int, default=64, metavar="N", help="requests that wait (default: 64)"
    )
    parser.add_argument(
        "--default-max-tokens",
        type=options.positive_int,
        default=1024,
        metavar="N",
        help="of a chat answer whose request names no limit (default: 1024)",
    )


def run(args: argparse.Namespace) -> int:
    model, tokenizer = open_model(args)
    try:
        serve(args, model, tokenizer, name=model_name(args))
    finally:
        model.close()
    return 0


def model_name(args: argparse.Namespace) -> str:
    from geopetals.join_token import JoinToken

    name: str = args.model or (JoinToken.decode(args.join).model if args.join else "")
    return name


def serve(args: argparse.Namespace, model: Any, tokenizer: Any, *, name: str) -> None:
    """Answer until Ctrl-C or SIGTERM. Raises NetworkError if the port is taken."""
    import uvicorn

    from geopetals.gateway.app import Gateway
    from geopetals.gateway.engine import Engine, Limits

    keys = api_keys(args)
    limits = Limits(running=args.max_running, waiting=args.max_waiting, tokens=args.default_max_tokens)
    sock = bind(args.host, args.port)
    engine = Engine(model, tokenizer, names=args.served_model_name or [name], limits=limits)
    config = uvicorn.Config(
        Gateway(engine, keys=keys, origins=args.cors_origin).app(),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    host = f"[{args.host}]" if ":" in args.host else args.host
    guarded = f"{len(keys)} key{'s' * (len(keys) != 1)}" if keys else "no key: anybody who reaches this may ask"
    print(f"OpenAI API on http://{host}:{sock.getsockname()[1]}/v1 ({guarded}); model {engine.names[0]}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn sends itself again what it was sent
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[sock])
    finally:
        engine.close()
        sock.close()


def bind(host: str, port: int) -> Any:
    """A listening socket. Raises NetworkError."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise NetworkError(
            f"cannot listen on {host} port {port} ({reason}): choose another --port or --host."
        ) from error
    return sock


def api_keys(args: argparse.Namespace) -> list[str]:
    """From options, a file or the environment: what stands on a command line is seen by everybody on the machine."""
    found = [*args.api_key, *os.environ.get(_KEY_VARIABLE, "").split(",")]
    if args.api_key_file is not None:
        try:
            found += args.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UnsupportedInput(f"cannot read {args.api_key_file}: choose another --api-key-file.") from error
    return [key.strip() for key in found if key.strip()]
