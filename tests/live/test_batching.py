"""Many sessions decode on one swarm at the same time: each gets the tokens that it would get alone."""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from transformers import AutoModelForCausalLM

from geopetals.swarm.local import LocalServer, LocalSwarm
from geopetals.swarm.wire import HANDLER
from tests.families import save_tiny, tiny_config
from tests.live.conftest import Connect
from tests.models import VOCABULARY

pytestmark = pytest.mark.live

NEW_TOKENS, DEADLINE_S = 24, 90.0
EXACT_LENGTH = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
Tokens = list[list[int]]


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def greedy(model: Any, ids: torch.Tensor) -> Tokens:
    found: Tokens = model.generate(ids, do_sample=False, **EXACT_LENGTH).tolist()
    return found


def beams(model: Any, ids: torch.Tensor) -> Tokens:
    found: Tokens = model.generate(ids, do_sample=False, num_beams=3, **EXACT_LENGTH).tolist()
    return found


@torch.no_grad()
def sampled(model: Any, ids: torch.Tensor) -> Tokens:
    """With a sampler of its own: generate() draws from one generator for all threads."""
    generator = torch.Generator().manual_seed(ids.shape[1])
    remote = hasattr(model, "inference_session")
    if remote:
        with model.inference_session(max_length=ids.shape[1] + NEW_TOKENS):
            return _sample(lambda new: model(new).logits, ids, generator)
    past: list[Any] = [None]

    def step(new: torch.Tensor) -> Any:
        out = model(new, past_key_values=past[0], use_cache=True)
        past[0] = out.past_key_values
        return out.logits

    return _sample(step, ids, generator)


def _sample(step: Callable[[torch.Tensor], Any], ids: torch.Tensor, generator: torch.Generator) -> Tokens:
    tokens, new = [ids], ids
    for _ in range(NEW_TOKENS):
        chances = torch.softmax(step(new)[:, -1] / 1.2, dim=-1)
        new = torch.multinomial(chances, 1, generator=generator)
        tokens.append(new)
    found: Tokens = torch.cat(tokens, dim=1).tolist()
    return found


WORK: list[tuple[Callable[[Any, torch.Tensor], Tokens], torch.Tensor]] = [
    (greedy, prompt(1)),
    (sampled, prompt(5)),
    (greedy, prompt(7, batch=3)),
    (sampled, prompt(40)),
    (beams, prompt(9)),
    (sampled, prompt(13, batch=2)),
    (greedy, prompt(300)),  # in several pieces, while the others decode
    (sampled, prompt(2)),
]


@pytest.mark.parametrize("family", ["gemma3_text", "bloom"])
def test_sessions_at_the_same_time_get_their_own_tokens(family: str, tmp_path: Path, connect: Connect) -> None:
    """Sliding windows in one, copies side by side in the other; one server is entered in the middle of its span."""
    save_tiny(tmp_path, tiny_config(family))
    local: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = [way(local, ids) for way, ids in WORK]
    with LocalSwarm(str(tmp_path)) as swarm:
        model = connect(tmp_path, join=swarm.start(spans=[(0, 3), (2, 6)]).token)
        assert in_threads([lambda way=way, ids=ids: way(model, ids) for way, ids in WORK]) == expected
        for server in swarm.servers:
            assert max(decode_batches(model, server)) > 1
        model.close()


def in_threads(works: list[Callable[[], Tokens]]) -> list[Tokens | None]:
    found: list[Tokens | None] = [None] * len(works)
    together = threading.Barrier(len(works))

    def run(number: int) -> None:
        together.wait(DEADLINE_S)
        found[number] = works[number]()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    return found


def decode_batches(model: Any, server: LocalServer) -> Counter[int]:
    """How many decode batches of which size a server has computed."""
    call = model.swarm.network.p2p.call_protobuf_handler(
        PeerID.from_base58(server.peer_id), f"{HANDLER}.rpc_info", runtime_pb2.ExpertUID(), runtime_pb2.ExpertInfo
    )
    return Counter(dict(MSGPackSerializer.loads(model.swarm.run(call).serialized_info)["decode_batches"]))
