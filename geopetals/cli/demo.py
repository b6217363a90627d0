"""`geopetals demo`: a real model, split over block servers on this machine, answers a question."""

import argparse
import json
import sys
from typing import Any

from geopetals.cli import options
from geopetals.cli.up import describe
from geopetals.progress import Console, Reporter, Silent

HELP = "split a real model over three block servers on this machine and let it answer a question"
_QUESTION = "Why is the sky blue? Answer in two sentences."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", nargs="?", default=_QUESTION, help=f"what to ask (default: {_QUESTION})")
    parser.add_argument(
        "--servers", type=options.positive_int, default=3, metavar="N", help="block servers (default: 3)"
    )
    parser.add_argument("--max-new-tokens", type=options.positive_int, default=64, metavar="N")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, with a comparison to the model run locally"
    )


def run(args: argparse.Namespace) -> int:
    from geopetals.swarm.local import LocalSwarm
    from geopetals.swarm.smollm2 import demo_model_directory

    reporter: Reporter = Silent() if args.json else Console()
    directory = str(demo_model_directory(reporter))
    with LocalSwarm(directory, reporter=reporter) as swarm:
        swarm.start(servers=args.servers)
        if not args.json:
            print("\n".join(describe(server) for server in swarm.servers), flush=True)
        result = _ask(swarm, directory, args)
    print(json.dumps(result) if args.json else _summary(result))
    return 0 if result["matches_local"] else 1


def _ask(swarm: Any, directory: str, args: argparse.Namespace) -> dict[str, Any]:
    from geopetals.client.model import AutoDistributedModelForCausalLM
    from geopetals.client.streaming import Stopwatch, prompt_ids
    from geopetals.swarm.checkpoint import Checkpoint

    model = AutoDistributedModelForCausalLM.from_pretrained(directory, join=swarm.token)
    try:
        tokenizer = Checkpoint.open(directory).tokenizer()
        ids = prompt_ids(tokenizer, args.question, chat=True)
        length = ids.shape[1] + args.max_new_tokens
        with model.inference_session(max_length=length) as session:
            session.open(ids.shape[0])
            if not args.json:
                print(f"chain {_chain_text(session.route)}\n\n> {args.question}", flush=True)
            watch = Stopwatch(tokenizer, echo=None if args.json else sys.stdout)
            output = model.generate(ids, max_new_tokens=args.max_new_tokens, streamer=watch, do_sample=False)
            chain = [{"peer_id": hop.peer_id, "start": hop.start, "end": hop.end} for hop in session.route]
    finally:
        model.close()
    tokens = output[0, ids.shape[1] :].tolist()
    return {
        "model": "SmolLM2-135M-Instruct",
        "servers": [_server_facts(server) for server in swarm.servers],
        "chain": chain,
        "prompt": args.question,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": tokens,
        **watch.figures(),
        "matches_local": _local_tokens(directory, ids, args.max_new_tokens) == tokens,
    }


def _server_facts(server: Any) -> dict[str, Any]:
    return {
        "peer_id": server.peer_id,
        "span": [server.start, server.end],
        "weights_bytes": server.weights_bytes,
        "memory_bytes": server.process_bytes,
    }


def _local_tokens(directory: str, ids: Any, max_new_tokens: int) -> list[int]:
    """What an unmodified Transformers model in this one process answers."""
    from transformers import AutoModelForCausalLM

    local: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    output = local.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
    tokens: list[int] = output[0, ids.shape[1] :].tolist()
    return tokens


def _chain_text(route: Any) -> str:
    return " -> ".join(["you", *(f"{hop.start}:{hop.end} on …{hop.peer_id[-6:]}" for hop in route), "you"])


def _summary(result: dict[str, Any]) -> str:
    same = "the same tokens as" if result["matches_local"] else "OTHER TOKENS THAN"
    return (
        f"\ntime to first token {result['ttft_s']:.2f} s, then {result['tokens_per_s']:.1f} tokens/s; "
        f"{same} an unmodified local model"
    )
