"""`geopetals api`: the OpenAI-compatible HTTP API of a swarm."""

import argparse
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geopetals.cli import options
from geopetals.cli.file_limit import raise_file_limit
from geopetals.cli.generate import add_swarm_arguments, open_model
from geopetals.errors import NetworkError, UnsupportedInput

HELP = "answer OpenAI's HTTP API with a model that a swarm serves"
_KEY_VARIABLE = "GEOPETALS_API_KEY"
_BACKLOG = 2048
_UNTAKEN_MS = 60_000


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
        "--no-api-key",
        action="store_true",
        help="let anybody ask; needed beyond loopback where there is no key",
    )
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
        help="name in the API (default: the model's, of a directory its last part)",
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
    api_keys(args)  # before the model is opened, which takes long
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


def public_name(model: str) -> str:
    """A model's name in the API: of a directory its last part, as where it is on this machine is nobody's business."""
    path = Path(model).expanduser()
    return path.resolve().name or model if path.is_dir() else model


def serve(
    args: argparse.Namespace, model: Any, tokenizer: Any, *, name: str, until: Callable[[], object] | None = None
) -> bool:
    """Answer until Ctrl-C or SIGTERM, or, with True as the result, until `until` returns in a thread of its own.

    Raises NetworkError if the port is taken, UnsupportedInput for keys that protect nothing.
    """
    from geopetals.gateway.app import Gateway
    from geopetals.gateway.engine import Engine, Limits
    from geopetals.gateway.http_server import Server

    raise_file_limit()
    keys = api_keys(args)
    limits = Limits(running=args.max_running, waiting=args.max_waiting, tokens=args.default_max_tokens)
    sock = bind(args.host, args.port)
    engine = Engine(model, tokenizer, names=args.served_model_name or [public_name(name)], limits=limits)
    server = Server(Gateway(engine, keys=keys, origins=args.cors_origin).app(), engine.give_up)
    host = f"[{args.host}]" if ":" in args.host else args.host
    guarded = f"{len(keys)} key{'s' * (len(keys) != 1)}" if keys else "no key: anybody who reaches this may ask"
    print(f"OpenAI API on http://{host}:{sock.getsockname()[1]}/v1 ({guarded}); model {engine.names[0]}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn sends itself again what it was sent
    if until is not None:
        threading.Thread(target=_end_after, args=(until, server), daemon=True).start()
    try:
        server.run(sockets=[sock])
    except KeyboardInterrupt:
        return False
    finally:
        engine.close()
        sock.close()
    return True


def _end_after(until: Callable[[], object], server: Any) -> None:
    until()
    server.should_exit = True


def bind(host: str, port: int) -> Any:
    """A listening socket. Raises NetworkError."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: who takes not even the end of an answer is forgotten
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNTAKEN_MS)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise NetworkError(
            f"cannot listen on {host} port {port} ({reason}): choose another --port or --host."
        ) from error
    return sock


def api_keys(args: argparse.Namespace) -> list[str]:
    """From options or a file, else the environment: what stands on a command line is seen by everybody on the machine.

    Raises UnsupportedInput where keys were meant but there are none, or where others could ask without one.
    """
    from geopetals.swarm.p2pd_options import is_loopback

    given = list(args.api_key)
    if args.api_key_file is not None:
        try:
            given += args.api_key_file.read_text(encoding="utf-8").splitlines() or [""]
        except (OSError, UnicodeDecodeError) as error:
            raise UnsupportedInput(f"cannot read {args.api_key_file}: choose another --api-key-file.") from error
    if args.no_api_key:
        if given:
            raise UnsupportedInput("--no-api-key lets everybody ask: leave it out, or the keys.")
        return []
    if not given and _KEY_VARIABLE in os.environ:
        given = os.environ[_KEY_VARIABLE].split(",")
    keys = [key.strip() for key in given if key.strip()]
    if given and not keys:
        raise UnsupportedInput(
            f"--api-key, --api-key-file or {_KEY_VARIABLE} is given but names no key: name one, or say --no-api-key."
        )
    if not keys and not is_loopback(args.host):
        raise UnsupportedInput(
            f"--host {args.host} can be reached from other machines: name an --api-key-file, or say --no-api-key."
        )
    return keys
