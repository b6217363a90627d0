"""`geopetals generate`: one prompt, one answer."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from geopetals.cli import options

if TYPE_CHECKING:
    from geopetals.client.model import DistributedModel

HELP = "continue a prompt with a model that a swarm serves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="text to continue; - reads it from standard input")
    add_swarm_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a chat message, by the model's template"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_swarm_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--join",
        type=options.join_token,
        metavar="TOKEN",
        help="the swarm's token, as `geopetals coordinator` or `geopetals serve` prints it; @FILE reads it from a file",
    )
    where.add_argument("--initial-peers", nargs="+", metavar="ADDRESS", help="libp2p addresses instead of a token")
    parser.add_argument("--model", help="Hub id or local directory (default: the token's)")
    parser.add_argument("--dht-prefix", help="the swarm's name, where it is not the model's")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--dtype", type=options.dtype_name, default="float32", help="format of embeddings and head")
    parser.add_argument("--device", type=options.device_name, default="cpu", help="where embeddings and head run")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=options.positive_int, default=128, metavar="N")
    parser.add_argument(
        "--temperature", type=options.temperature, help="sample with this temperature (default: greedy)"
    )
    parser.add_argument("--top-p", type=options.probability, help="sample from this share of the probability")
    parser.add_argument("--seed", type=options.seed, help="makes sampling repeatable")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """generate() arguments; greedy unless a temperature or top-p is given."""
    wanted = {"temperature": args.temperature, "top_p": args.top_p}
    given = {name: value for name, value in wanted.items() if value is not None}
    if not given or args.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, **given}


def open_model(args: argparse.Namespace) -> "tuple[DistributedModel, Any]":
    """The model and its tokenizer. What has to be downloaded is told on stderr."""
    from geopetals.cli.downloads import Downloads
    from geopetals.client.model import AutoDistributedModelForCausalLM
    from geopetals.join_token import JoinToken
    from geopetals.swarm.checkpoint import Checkpoint

    reporter = Downloads()
    name = args.model or (JoinToken.decode(args.join).model if args.join else None)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        name,
        join=args.join,
        initial_peers=args.initial_peers or (),
        dht_prefix=args.dht_prefix,
        revision=args.revision,
        dtype=args.dtype,
        device=args.device,
        reporter=reporter,
        on_wait=_tell,
    )
    return model, Checkpoint.open(str(name), revision=args.revision, reporter=reporter).tokenizer()


def _tell(waiting: object) -> None:
    print(f"({waiting})", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    import torch

    from geopetals.client.streaming import Stopwatch, prompt_ids

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model, tokenizer = open_model(args)
    try:
        if args.seed is not None:
            torch.manual_seed(args.seed)
        ids = prompt_ids(tokenizer, prompt, chat=args.chat).to(model.device)
        watch = Stopwatch(tokenizer, echo=None if args.json else sys.stdout)
        length = ids.shape[1] + args.max_new_tokens
        with model.inference_session(max_length=length, output_tokens=args.max_new_tokens) as session:
            output = model.generate(ids, max_new_tokens=args.max_new_tokens, streamer=watch, **sampling(args))
            route = [[hop.peer_id, hop.start, hop.end] for hop in session.route]
        if args.json:
            tokens = output[0, ids.shape[1] :].tolist()
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            print(json.dumps({"prompt": prompt, "text": text, "tokens": tokens, "route": route, **watch.figures()}))
    finally:
        model.close()
    return 0
