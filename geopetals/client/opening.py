"""Opening a model without its blocks, and the connection to the swarm that serves them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from geopetals.client.config import ClientConfig
from geopetals.client.hollow import RemoteStack, load_client
from geopetals.client.swarm import SwarmClient
from geopetals.errors import SwarmMismatch, UnsupportedInput
from geopetals.join_token import JoinToken, swarm_name_for
from geopetals.progress import Reporter, Silent
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.devices import choose_device


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A hollow model, the module in it that stands for the blocks, and the swarm to connect that to."""

    model: PreTrainedModel
    swarm: SwarmClient
    stack: RemoteStack
    checkpoint: Checkpoint


def open_hollow_model(
    model: str | os.PathLike[str] | None,
    *,
    join: str | JoinToken | None,
    initial_peers: Sequence[str],
    dht_prefix: str | None,
    revision: str | None,
    dtype: torch.dtype | str,
    device: str,
    reporter: Reporter | None,
    options: dict[str, Any],
) -> OpenedModel:
    """The model without its blocks, a connection to the swarm that serves them, and the module to connect it to."""
    token = JoinToken.decode(join) if isinstance(join, str) else join
    name = str(model) if model else (token.model if token is not None else None)
    if name is None:
        raise UnsupportedInput("say which model: from_pretrained(MODEL, join=TOKEN).")
    if (token is None) == (not initial_peers):
        raise UnsupportedInput("say which swarm: pass either join=TOKEN or initial_peers=[...].")
    config = _client_config(options)
    checkpoint = Checkpoint.open(name, revision=revision, reporter=reporter or Silent())
    identity = checkpoint.identity()
    conflict = identity.conflict(token.identity) if token is not None else None
    if conflict is not None:
        raise SwarmMismatch(f"the token is for a swarm of another model: {conflict}")
    loaded, stack = load_client(
        checkpoint, dtype=_as_dtype(dtype), device=choose_device(device), reporter=reporter or Silent()
    )
    swarm = SwarmClient(
        peers=token.peers if token is not None else tuple(initial_peers),
        swarm=dht_prefix or (token.swarm if token is not None else swarm_name_for(name)),
        num_blocks=checkpoint.num_blocks,
        hidden_size=int(checkpoint.config.hidden_size),
        identity=identity,
        config=config,
        token=token,
    )
    swarm.start()
    return OpenedModel(model=loaded, swarm=swarm, stack=stack, checkpoint=checkpoint)


def _client_config(options: dict[str, Any]) -> ClientConfig:
    try:
        return ClientConfig(**options)
    except TypeError:
        known = ", ".join(ClientConfig.__dataclass_fields__)
        unknown = ", ".join(sorted(set(options) - set(ClientConfig.__dataclass_fields__)))
        raise UnsupportedInput(f"unknown option {unknown}: the options are {known}.") from None


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedInput(f"{dtype!r} is no number format: use float32, bfloat16 or float16.")
    return found
