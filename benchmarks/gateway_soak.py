"""Does the gateway keep its promises for minutes of mixed load while servers are killed?

Method. A tiny Llama on four servers, two replicas of each block, and `geopetals api` as a process of its own. `--users`
threads with the openai package ask at random, by a seed: completions and chats, whole and streamed, greedy, with stop
texts, some readers hang up in the middle. Every `--kill-every` seconds a server is killed (SIGKILL) and another one
started in its place. Afterwards:

    wrong               finished answers that are not the unmodified local model's: must be 0
    errors_5xx          answers with a 5xx other than 503, and streams that ended with one: must be 0
    unavailable         503 while blocks were missing, counted
    leaks               growth of the gateway's descriptors and threads once all is quiet: must be 0; of its memory

    python benchmarks/gateway_soak.py [--quick] [--minutes M] [--out FILE]
"""

import argparse
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import psutil
import torch
from provenance import write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parents[1]))
from geopetals.swarm.local import LocalSwarm
from tests.live.commands import Command, wait_for
from tests.models import save_llama

_SPANS = [(0, 3), (3, 6), (0, 3), (3, 6)]
_SEED, _NAME, _PROMPTS, _TOKENS = 20251221, "tiny", 12, 40
_HANG_UP = 0.15


class Answers:
    """What the local model says, and what became of the requests."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        local: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        chance = random.Random(_SEED)
        words = ["the", "sun", "rises", "in", "east", "and", "sets", "over", "quiet", "hills", "old", "rivers"]
        self.prompts = [" ".join(chance.choices(words, k=chance.randrange(1, 20))) for _ in range(_PROMPTS)]
        self._expected = {}
        for prompt in self.prompts:
            chat: Any = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )
            for kind, ids in (("text", self._tokenizer(prompt).input_ids), ("chat", chat["input_ids"])):
                self._expected[kind, prompt] = self._generate(local, ids)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self.lock = threading.Lock()

    def _generate(self, local: Any, ids: list[int]) -> str:
        inputs = torch.tensor([ids])
        output = local.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=_TOKENS, do_sample=False)
        return str(self._tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    def note(self, kind: str, prompt: str, text: str, stop: str | None, seconds: float) -> None:
        expected = self._expected[kind, prompt]
        if stop is not None and stop in expected:
            expected = expected[: expected.index(stop)]
        with self.lock:
            self.counts["finished"] += 1
            self.seconds.append(seconds)
            if text != expected:
                self.wrong.append(f"{kind} {prompt!r}: {text!r} is not {expected!r}")

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1


def user(number: int, url: str, answers: Answers, over: threading.Event) -> None:
    chance = random.Random(_SEED + number)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    while not over.is_set():
        try:
            _ask(client, chance, answers)
        except openai.RateLimitError:
            answers.count("busy_429")
        except openai.APIStatusError as error:
            answers.count("unavailable_503" if error.status_code == 503 else f"error_{error.status_code}")
        except openai.APIError as error:  # in the middle of a stream
            kind = getattr(error, "type", None) or type(error).__name__
            answers.count("interrupted" if kind == "service_unavailable" else f"error_{kind}")
        over.wait(chance.random() * 0.3)


def _ask(client: openai.OpenAI, chance: random.Random, answers: Answers) -> None:
    prompt, kind = chance.choice(answers.prompts), chance.choice(["text", "chat"])
    stop = chance.choice([None, None, "a", "th"])
    streamed, hangs_up = chance.random() < 0.6, chance.random() < _HANG_UP
    options: dict[str, Any] = {"model": _NAME, "max_tokens": _TOKENS, "temperature": 0, "stop": stop}
    began = time.monotonic()
    if kind == "chat":
        messages: Any = [{"role": "user", "content": prompt}]
        if not streamed:
            whole = client.chat.completions.create(messages=messages, **options)
            text = whole.choices[0].message.content or ""
        else:
            chunks = client.chat.completions.create(messages=messages, stream=True, **options)
            text = _read(chunks, lambda choice: choice.delta.content or "", hangs_up, answers)
    elif not streamed:
        text = client.completions.create(prompt=prompt, **options).choices[0].text
    else:
        text = _read(
            client.completions.create(prompt=prompt, stream=True, **options), lambda c: c.text, hangs_up, answers
        )
    if not (streamed and hangs_up):
        answers.note(kind, prompt, text, stop, time.monotonic() - began)


def _read(chunks: Any, text_of: Any, hangs_up: bool, answers: Answers) -> str:
    text = ""
    for number, chunk in enumerate(chunks):
        text += "".join(text_of(choice) for choice in chunk.choices)
        if hangs_up and number == 3:
            chunks.close()
            answers.count("hung_up")
            break
    return text


def _footprint(process: psutil.Process) -> dict[str, int]:
    return {
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "memory_bytes": process.memory_info().rss,
        "connections": len(process.net_connections()),
    }


def _soak(folder: Path, *, minutes: float, kill_every_s: float, users: int) -> dict[str, Any]:
    model = save_llama(folder / "llama")
    answers, kills = Answers(model), 0
    with LocalSwarm(str(model)) as swarm:
        swarm.start(spans=_SPANS)
        command = Command(
            "api", "--join", swarm.token, "--model", model, "--port", "0", "--served-model-name", _NAME,
            "--max-running", str(users),
        )  # fmt: skip
        try:
            url = command.wait_line(r"(http://\S+)/v1", timeout_s=120).group(1)
            process, over = psutil.Process(command.pid), threading.Event()
            warm = threading.Event()
            _run_users(url, answers, users, warm, seconds=min(20.0, minutes * 10), between=lambda: None, every_s=1e9)
            before = _quiet(process)

            def kill() -> None:
                nonlocal kills
                victim = random.Random(_SEED + kills).choice(swarm.servers)
                swarm.kill(victim)
                swarm.add((victim.start, victim.end))
                kills += 1

            _run_users(url, answers, users, over, seconds=minutes * 60, between=kill, every_s=kill_every_s)
            after = _quiet(process)
            log = command.err.text
        finally:
            command.destroy()
    return {
        "counts": dict(answers.counts),
        "wrong": answers.wrong[:5],
        "num_wrong": len(answers.wrong),
        "kills": kills,
        "before": before,
        "after": after,
        "tracebacks": len(re.findall("Traceback", log)),
        "seconds_p50": statistics.median(answers.seconds),
        "seconds_max": max(answers.seconds),
    }


def _run_users(
    url: str, answers: Answers, users: int, over: threading.Event, *, seconds: float, between: Any, every_s: float
) -> None:
    threads = [threading.Thread(target=user, args=(number, url, answers, over)) for number in range(users)]
    for thread in threads:
        thread.start()
    began = last = time.monotonic()
    while time.monotonic() - began < seconds:
        time.sleep(0.2)
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            between()
            print(f"{time.monotonic() - began:.0f} s: {dict(answers.counts)}", flush=True)
    over.set()
    for thread in threads:
        thread.join(180)


def _quiet(process: psutil.Process) -> dict[str, int]:
    """Once connections that are kept alive have ended."""
    wait_for(lambda: len(process.net_connections("inet")) <= 4, timeout_s=60, what="the end of idle connections")
    return _footprint(process)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one minute, a kill every 15 s")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gateway_soak.json")
    args = parser.parse_args()
    minutes, kill_every_s = (1.0, 15.0) if args.quick else (args.minutes, args.kill_every)
    with tempfile.TemporaryDirectory() as folder:
        run = _soak(Path(folder), minutes=minutes, kill_every_s=kill_every_s, users=args.users)
    errors = sum(count for name, count in run["counts"].items() if name.startswith("error_"))
    summary = {
        "minutes": minutes,
        "finished": run["counts"].get("finished", 0),
        "wrong": run["num_wrong"],
        "errors_5xx": errors,
        "unavailable_503": run["counts"].get("unavailable_503", 0),
        "interrupted": run["counts"].get("interrupted", 0),
        "kills": run["kills"],
        "tracebacks": run["tracebacks"],
        "descriptors_grown": run["after"]["descriptors"] - run["before"]["descriptors"],
        "threads_grown": run["after"]["threads"] - run["before"]["threads"],
        "memory_grown_bytes": run["after"]["memory_bytes"] - run["before"]["memory_bytes"],
        "seconds_p50": run["seconds_p50"],
        "seconds_max": run["seconds_max"],
    }
    write_results(args.out, summary=summary, runs=[run], seed=_SEED)
    leaks = max(summary["descriptors_grown"], summary["threads_grown"]) > 0
    return 0 if not (run["num_wrong"] or errors or run["tracebacks"] or leaks) else 1


if __name__ == "__main__":
    sys.exit(main())
