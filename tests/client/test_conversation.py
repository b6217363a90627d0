import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from geopetals.client.conversation import Conversation
from geopetals.client.model import DistributedModel
from geopetals.client.streaming import chat_ids
from geopetals.errors import NoChain, UnsupportedInput
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.stage import Stage
from tests.client.fake_swarm import FakeHop, World, connect, load_stages
from tests.models import save_llama

OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("conversation"))


@pytest.fixture(scope="module")
def stages(directory: Path) -> list[Stage]:
    return load_stages(directory)


@pytest.fixture(scope="module")
def local(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return Checkpoint.open(str(directory)).tokenizer()


@pytest.fixture
def world(stages: list[Stage]) -> World:
    return World(stages)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, directory: Path, world: World) -> Iterator[DistributedModel]:
    connected = connect(monkeypatch, directory, world)
    yield connected
    connected.close()


class LocalTalk:
    """The same turns with the whole model in this process and no cache between turns."""

    def __init__(self, local: Any, tokenizer: Any, system: str | None = None) -> None:
        self._local, self._tokenizer = local, tokenizer
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def say(self, text: str) -> str:
        self._messages.append({"role": "user", "content": text})
        ids = chat_ids(self._tokenizer, self._messages)
        output = self._local.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
        answer: str = self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": answer})
        return answer


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_turns_are_answered_as_by_the_local_model(
    model: DistributedModel, local: Any, tokenizer: Any, system: str | None
) -> None:
    conversation, reference = Conversation(model, tokenizer, system=system), LocalTalk(local, tokenizer, system)
    for text in ("hello", "why?", "äöü 世界"):
        assert conversation.say(text, **OPTIONS) == reference.say(text)
    conversation.reset()


def test_after_a_reset_nothing_is_remembered(model: DistributedModel, local: Any, tokenizer: Any, world: World) -> None:
    conversation = Conversation(model, tokenizer, system="Be brief.")
    conversation.say("hello", **OPTIONS)
    conversation.say("my name is Ada", **OPTIONS)
    conversation.reset()
    assert world.caches_held == 0
    assert conversation.say("hello", **OPTIONS) == LocalTalk(local, tokenizer, "Be brief.").say("hello")
    conversation.reset()
    conversation.reset()
    assert world.caches_held == 0


def test_the_answer_appears_as_it_comes(model: DistributedModel, tokenizer: Any) -> None:
    stream = io.StringIO()
    conversation = Conversation(model, tokenizer)
    answer = conversation.say("hello", echo=stream, **OPTIONS)
    assert stream.getvalue().rstrip("\n") == answer.rstrip("\n")
    conversation.reset()


def test_one_conversation_holds_one_session(model: DistributedModel, tokenizer: Any, world: World) -> None:
    conversation = Conversation(model, tokenizer)
    for text in ("one", "two", "three"):
        conversation.say(text, **OPTIONS)
        assert world.caches_held == 2
    conversation.reset()
    assert world.caches_held == 0


def test_turns_that_outgrow_the_session_get_a_longer_one(
    model: DistributedModel, local: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geopetals.client.conversation._ROOM", 1)
    conversation, reference = Conversation(model, tokenizer), LocalTalk(local, tokenizer)
    for text in ("hello", "a longer question than the first one was"):
        assert conversation.say(text, **OPTIONS) == reference.say(text)
    conversation.reset()


def test_an_answer_that_is_stopped_ends_at_a_token(
    model: DistributedModel, local: Any, tokenizer: Any, world: World
) -> None:
    conversation, reference = Conversation(model, tokenizer), LocalTalk(local, tokenizer)
    whole = reference.say("hello")

    async def stop(hop: FakeHop, number: int) -> None:
        if number == 2 * 3:
            conversation.stop()

    world.before_step = stop
    part = conversation.say("hello", **OPTIONS)
    assert whole.startswith(part.rstrip("\ufffd"))
    assert len(part) < len(whole)
    world.before_step = None
    longer = conversation.say("go on", **OPTIONS)
    assert longer
    messages = [("user", "hello"), ("assistant", part), ("user", "go on")]
    ids = chat_ids(tokenizer, [{"role": role, "content": content} for role, content in messages])
    output = local.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
    assert longer == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    conversation.reset()


def test_a_turn_that_fails_is_forgotten(model: DistributedModel, local: Any, tokenizer: Any, world: World) -> None:
    conversation, reference = Conversation(model, tokenizer), LocalTalk(local, tokenizer)
    assert conversation.say("hello", **OPTIONS) == reference.say("hello")
    world.dead.update(f"server{number}" for number in range(5))
    with pytest.raises(NoChain):
        conversation.say("lost words", **OPTIONS)
    assert world.caches_held == 0
    world.dead.clear()
    model.swarm.avoided.clear()  # type: ignore[attr-defined]
    assert conversation.say("why?", **OPTIONS) == reference.say("why?")
    conversation.reset()


def test_a_model_without_a_template_cannot_talk(
    model: DistributedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UnsupportedInput, match="template"):
        Conversation(model, tokenizer).say("hello", **OPTIONS)
