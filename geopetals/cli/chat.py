"""`geopetals chat`: a conversation in the terminal."""

import argparse
import select
import signal
import sys
from types import FrameType
from typing import Any

from geopetals.cli.generate import add_sampling_arguments, add_swarm_arguments, open_model, sampling
from geopetals.errors import SwarmFailure

HELP = "talk with a model that a swarm serves"
_SIGNAL_CHECK_S = 0.5
_HELP_TEXT = "/reset forgets the conversation, /quit leaves, Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_swarm_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--system", help="instructions to the model, before the conversation")


def run(args: argparse.Namespace) -> int:
    import torch

    from geopetals.client.conversation import Conversation

    model, tokenizer = open_model(args)
    try:
        if args.seed is not None:
            torch.manual_seed(args.seed)
        conversation = Conversation(model, tokenizer, system=args.system)
        print(_HELP_TEXT, file=sys.stderr)
        _talk(conversation, {"max_new_tokens": args.max_new_tokens, **sampling(args)})
        conversation.reset()
    finally:
        model.close()
    return 0


def _talk(conversation: Any, options: dict[str, Any]) -> None:
    while True:
        try:
            line = _next_line().strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            conversation.reset()
            print("(forgotten)", file=sys.stderr)
        elif line == "/help":
            print(_HELP_TEXT, file=sys.stderr)
        elif line:
            _answer(conversation, line, options)


def _next_line() -> str:
    """What a person types. Waits in slices: a Ctrl-C just before input() goes to sleep would not wake it."""
    if not sys.stdin.isatty():
        return input()
    print("> ", end="", flush=True)
    while not select.select([sys.stdin], [], [], _SIGNAL_CHECK_S)[0]:
        continue
    return input()


def _answer(conversation: Any, line: str, options: dict[str, Any]) -> None:
    """Ctrl-C while the answer comes ends the answer at a token boundary, so that the conversation can go on.

    Where no token comes, a second Ctrl-C drops the turn.
    """
    pressed = 0

    def stop(signal_number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        conversation.stop()
        if pressed > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        conversation.say(line, echo=sys.stdout, **options)
    except KeyboardInterrupt:
        print("\n(no answer)", file=sys.stderr)
    except SwarmFailure as error:
        print(f"\n(no answer: {error})", file=sys.stderr)
    finally:
        signal.signal(signal.SIGINT, before)
