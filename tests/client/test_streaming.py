import io
from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.client.streaming import Stopwatch, chat_ids, prompt_ids
from geopetals.errors import UnsupportedInput
from geopetals.swarm.checkpoint import Checkpoint
from tests.models import save_llama


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = save_llama(tmp_path_factory.mktemp("streaming"), layers=2)
    return Checkpoint.open(str(directory)).tokenizer()


def play(watch: Stopwatch, tokenizer: Any, prompt: str, answer: str) -> None:
    watch.put(tokenizer(prompt, return_tensors="pt").input_ids)
    for token in tokenizer(answer).input_ids:
        watch.put(torch.tensor([token]))
    watch.end()


def test_the_answer_is_shown_without_the_prompt(tokenizer: Any) -> None:
    stream = io.StringIO()
    play(Stopwatch(tokenizer, echo=stream), tokenizer, "2 + 2 =", "four, I think")
    assert stream.getvalue() == "four, I think\n"


def test_letters_of_several_bytes_are_not_torn(tokenizer: Any) -> None:
    stream = io.StringIO()
    play(Stopwatch(tokenizer, echo=stream), tokenizer, "x", "Grüße, 世界 🙂 !")
    assert stream.getvalue() == "Grüße, 世界 🙂 !\n"


def test_special_tokens_are_not_shown(tokenizer: Any) -> None:
    stream = io.StringIO()
    play(Stopwatch(tokenizer, echo=stream), tokenizer, "x", "yes</s>")
    assert stream.getvalue() == "yes\n"


def test_silence_still_counts(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Stopwatch(tokenizer, echo=None)
    play(watch, tokenizer, "x", "word word")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    figures = watch.figures()
    assert figures["num_tokens"] == 9
    ttft_s, rate = figures["ttft_s"], figures["tokens_per_s"]
    assert ttft_s is not None
    assert ttft_s > 0
    assert rate is not None
    assert rate > 0


@pytest.mark.parametrize(("answer", "known"), [("", ()), ("a", ("ttft_s",))])
def test_too_few_tokens_have_no_rate(tokenizer: Any, answer: str, known: tuple[str, ...]) -> None:
    watch = Stopwatch(tokenizer, echo=None)
    play(watch, tokenizer, "x", answer)
    figures = watch.figures()
    assert figures["num_tokens"] == len(answer)
    assert tuple(name for name in ("ttft_s", "tokens_per_s") if figures[name] is not None) == known


def test_the_rate_counts_the_tokens_after_the_first(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0, 2.5, 3.0])
    monkeypatch.setattr("geopetals.client.streaming.time.perf_counter", lambda: next(times))
    watch = Stopwatch(tokenizer, echo=None)
    play(watch, tokenizer, "x", "abc")
    assert watch.figures() == {"ttft_s": 2.0, "tokens_per_s": 2.0, "num_tokens": 3}


def test_a_prompt_becomes_tokens(tokenizer: Any) -> None:
    assert prompt_ids(tokenizer, "ab", chat=False).shape == (1, 2)
    chat = prompt_ids(tokenizer, "ab", chat=True)
    assert tokenizer.decode(chat[0]) == "<s>user: ab</s><s>assistant: "


def test_an_empty_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UnsupportedInput, match="empty"):
        prompt_ids(tokenizer, "", chat=False)


def test_a_model_without_a_template_cannot_chat(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UnsupportedInput, match="no chat template"):
        chat_ids(tokenizer, [{"role": "user", "content": "hello"}])
