"""Questions that a local model, a stock PETALS client and a GeoPETALS client answer alike, with transformers 4 and 5.

Needs torch alone: both environments import it. Answers are JSON: token ids, or numbers of a tensor.
"""

from typing import Any

import torch

NEW_TOKENS = 12
DEEP_PROMPTS = {"tuning_mode": "deep_ptune", "pre_seq_len": 3}
TOKEN_QUESTIONS = ("greedy", "sampled", "sampled batch", "beams", "in pieces")
_PROMPT = [[11, 42, 7, 99, 150, 3, 201]]
_BATCH = [[11, 42, 7, 99, 150], [250, 8, 61, 77, 13]]


def ask(model: Any, question: str) -> list[Any]:
    """`model` is anything with transformers' generate() and forward()."""
    return _QUESTIONS[question](model)


def _greedy(model: Any) -> list[Any]:
    return _generate(model, _PROMPT, do_sample=False)


def _sampled(model: Any) -> list[Any]:
    torch.manual_seed(7)
    return _generate(model, _PROMPT, do_sample=True, temperature=1.2, top_k=100, top_p=0.95)


def _sampled_batch(model: Any) -> list[Any]:
    torch.manual_seed(8)
    return _generate(model, _BATCH, do_sample=True, temperature=0.9, top_k=0)


def _beams(model: Any) -> list[Any]:
    return _generate(model, _PROMPT, do_sample=False, num_beams=3)


def _generate(model: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    inputs = torch.tensor(prompts)
    output = model.generate(inputs, max_new_tokens=NEW_TOKENS, pad_token_id=0, **options)
    return list(output[:, inputs.shape[1] :].tolist())


def _in_pieces(model: Any) -> list[Any]:
    """Greedy tokens of two calls in one session; a local model has no sessions and makes them in one call."""
    if not hasattr(model, "inference_session"):
        return _greedy(model)
    inputs = torch.tensor(_PROMPT)
    with model.inference_session(max_length=inputs.shape[1] + NEW_TOKENS):
        options = {"do_sample": False, "pad_token_id": 0}
        first = model.generate(inputs, max_new_tokens=5, **options)
        rest = model.generate(None, max_new_tokens=NEW_TOKENS - 5, **options)
    return list(torch.cat([first[:, inputs.shape[1] :], rest], dim=1).tolist())


def _logits(model: Any) -> list[Any]:
    """Without a session: remote blocks run as rpc_forward."""
    with torch.no_grad():
        return list(model(torch.tensor(_BATCH)).logits.tolist())


def _many_tokens(model: Any) -> list[Any]:
    """2560 tokens: more than a stock server takes in one request."""
    tokens = torch.randint(3, 259, (20, 128), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return list(model(tokens).logits[:, -1].tolist())


def _long_text(model: Any) -> list[Any]:
    """One sequence whose hidden states (4200 x 64 float32) stock clients send as a stream, in parts."""
    tokens = torch.randint(3, 259, (1, 4200), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return list(model(tokens).logits[:, -1].tolist())


def _input_gradients(model: Any) -> list[Any]:
    """Gradients of a language modelling loss with respect to the embedded tokens: rpc_backward."""
    tokens = torch.tensor(_BATCH)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    _loss(model(inputs_embeds=embedded).logits, tokens).backward()
    assert embedded.grad is not None
    return list(embedded.grad.tolist())


def _deep_prompt_gradients(model: Any) -> list[Any]:
    """Gradients with respect to trained prefixes of every block's input; for models opened with deep_ptune."""
    body, tokens = model.base_model, torch.tensor(_BATCH)
    generator = torch.Generator().manual_seed(9)
    tables = (body.prompt_embeddings.weight, body.intermediate_prompt_embeddings.weight)
    for table in tables:
        table.data.copy_(0.5 * torch.randn(table.shape, generator=generator))
        table.grad = None
    _loss(model(tokens).logits, tokens).backward()
    return [table.grad.tolist() for table in tables]


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


_QUESTIONS = {
    "greedy": _greedy,
    "sampled": _sampled,
    "sampled batch": _sampled_batch,
    "beams": _beams,
    "in pieces": _in_pieces,
    "logits": _logits,
    "many tokens": _many_tokens,
    "long text": _long_text,
    "input gradients": _input_gradients,
    "deep prompt gradients": _deep_prompt_gradients,
}
