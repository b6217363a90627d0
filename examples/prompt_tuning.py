"""Teach a model in a swarm to end reviews with a mark, green or red, by prompt tuning: no server's weights change.

    python examples/prompt_tuning.py                    SmolLM2-135M-Instruct over three servers on this machine
    python examples/prompt_tuning.py --join TOKEN       a swarm that is already there

Sixteen vectors before the text (and in every block, with --tuning-mode deep_ptune) are trained on a dozen reviews. The
loss falls, and the model then gives marks to reviews it has not seen; so small a model is often wrong about which.
`--quick` takes ten steps on four reviews.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

REVIEWS = [
    ("I laughed from beginning to end.", "green"),
    ("A dull story that goes nowhere.", "red"),
    ("The actors are wonderful and so is the music.", "green"),
    ("I want my money back.", "red"),
    ("My favourite film of the year.", "green"),
    ("Two hours of my life that I will never see again.", "red"),
    ("Tender, clever and beautifully filmed.", "green"),
    ("The plot makes no sense and the jokes are old.", "red"),
    ("I would watch it again tomorrow.", "green"),
    ("We left the cinema after half an hour.", "red"),
    ("A masterpiece.", "green"),
    ("Even the popcorn was better than this.", "red"),
]
UNSEEN = [
    ("What a delightful evening.", "green"),
    ("It is a complete waste of time.", "red"),
    ("The best thing I have seen in years.", "green"),
    ("Boring, loud and far too long.", "red"),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prompt tuning through a swarm.")
    parser.add_argument("--join", metavar="TOKEN", help="a swarm's token (default: start the demo's swarm here)")
    parser.add_argument("--model", help="Hub id or local directory (default: the token's)")
    parser.add_argument("--tuning-mode", choices=["ptune", "deep_ptune"], default="ptune")
    parser.add_argument("--pre-seq-len", type=int, default=16, metavar="N", help="prompt vectors (default: 16)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="passes over all reviews (default: 25)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate (default: 0.1)")
    parser.add_argument("--save", metavar="FILE", help="write the trained prompts as safetensors")
    parser.add_argument("--quick", action="store_true", help="ten steps on four reviews")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


@contextlib.contextmanager
def swarm_to_join(args: argparse.Namespace) -> Iterator[tuple[str | None, str]]:
    """Model and token: those given, or of a swarm that lasts as long as this block."""
    if args.join:
        yield args.model, args.join
        return
    from geopetals.progress import Console, Silent
    from geopetals.swarm.local import LocalSwarm
    from geopetals.swarm.smollm2 import demo_model_directory

    reporter = Silent() if args.json else Console()
    directory = args.model or str(demo_model_directory(reporter))
    with LocalSwarm(directory, reporter=reporter) as swarm:
        yield directory, swarm.start(servers=3).token


def encode(tokenizer: Any, reviews: list[tuple[str, str]]) -> tuple[dict[str, Any], Any]:
    """Inputs padded on the right, and labels that count the last token of each text alone: the mark."""
    import torch

    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [f"Review: {review} Mark: {mark}" for review, mark in reviews]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    last = batch["attention_mask"].sum(dim=1, keepdim=True) - 1
    places = torch.arange(batch["input_ids"].shape[1])[None]
    return dict(batch), batch["input_ids"].masked_fill(places != last, -100)


def share_marked(model: Any, tokenizer: Any, reviews: list[tuple[str, str]]) -> float:
    """How often the most likely next token is a mark, whichever."""
    import torch

    inputs, labels = encode(tokenizer, reviews)
    with torch.no_grad():
        scores = model(**inputs).logits[:, :-1][labels[:, 1:] != -100]
    return float(torch.isin(scores.argmax(dim=-1), labels[labels != -100]).float().mean())


def train(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    reviews, steps = (REVIEWS[:4], 10) if args.quick else (REVIEWS, args.steps)
    prompts = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(prompts.values(), lr=args.lr)
    inputs, labels = encode(tokenizer, reviews)
    losses, marked_before, began = [], share_marked(model, tokenizer, UNSEEN), time.monotonic()
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if not args.json:
            print(f"step {step + 1:3} of {steps}: loss {losses[-1]:.4f}", flush=True)
    took_s = time.monotonic() - began
    if args.save:
        from safetensors.torch import save_file

        save_file({name: parameter.detach() for name, parameter in prompts.items()}, args.save)
    return {
        "trained_parameters": sum(parameter.numel() for parameter in prompts.values()),
        "losses": losses,
        "seconds_per_step": took_s / steps,
        "unseen_marked_before": marked_before,
        "unseen_marked_after": share_marked(model, tokenizer, UNSEEN),
    }


def main() -> int:
    args = parse_arguments()
    import torch

    from geopetals import AutoDistributedModelForCausalLM
    from geopetals.join_token import JoinToken
    from geopetals.swarm.checkpoint import Checkpoint

    torch.manual_seed(0)
    with swarm_to_join(args) as (name, token):
        model = AutoDistributedModelForCausalLM.from_pretrained(
            name, join=token, tuning_mode=args.tuning_mode, pre_seq_len=args.pre_seq_len
        )
        try:
            tokenizer = Checkpoint.open(name or JoinToken.decode(token).model).tokenizer()
            result = train(model, tokenizer, args)
        finally:
            model.close()
    first, last = result["losses"][0], result["losses"][-1]
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['trained_parameters']} parameters trained; loss {first:.4f} -> {last:.4f}")
        before, after = result["unseen_marked_before"], result["unseen_marked_after"]
        print(f"reviews not seen: {before:.0%} marked before, {after:.0%} after")
    return 0 if last < first else 1


if __name__ == "__main__":
    raise SystemExit(main())
