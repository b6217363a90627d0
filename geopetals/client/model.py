"""`AutoDistributedModelForCausalLM`: a Transformers model whose blocks run in a swarm."""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
from transformers import GenerationMixin, PreTrainedModel

from geopetals.client.config import ClientConfig
from geopetals.client.hollow import RemoteCache, load_client
from geopetals.client.session import InferenceSession
from geopetals.client.swarm import SwarmClient
from geopetals.errors import SwarmMismatch, UnsupportedInput
from geopetals.join_token import JoinToken, swarm_name_for
from geopetals.progress import Reporter, Silent
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.devices import choose_device

_DEFAULT_NEW_TOKENS = 20
_NEEDS_A_LOCAL_CACHE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha")


class AutoDistributedModelForCausalLM:
    """Opens a model whose embeddings and head are here and whose blocks are in a swarm."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        *,
        join: str | JoinToken | None = None,
        initial_peers: Sequence[str] = (),
        dht_prefix: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: str = "cpu",
        reporter: Reporter | None = None,
        **options: Any,
    ) -> "DistributedModel":
        """`model` is a Hub id or a local directory (default: the token's); `join` a token as `geopetals serve` prints
        it.

        Instead of a token, `initial_peers` (libp2p addresses) and, where the swarm's name is not the model's,
        `dht_prefix` may be given, as in PETALS. `options` are the fields of ClientConfig. Raises GeoPetalsError with
        one sentence when the model cannot be found, the swarm cannot be reached, or it serves another model.
        """
        token = JoinToken.decode(join) if isinstance(join, str) else join
        name = model or (token.model if token is not None else None)
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
        )
        swarm.start()
        return _distributed(loaded, swarm, stack)


class DistributedModel(PreTrainedModel, GenerationMixin):
    """What `from_pretrained` returns: the model's own Transformers class with these methods in front of its own.

    A session is active inside `with model.inference_session(max_length=...)`; `generate()` and `forward()` then go on
    where the session is. Outside, `generate()` opens one for itself and `forward()` runs without a cache.
    """

    _swarm: SwarmClient
    _active: ContextVar[InferenceSession | None]
    _finalizer: Any

    @property
    def swarm(self) -> SwarmClient:
        """The connection to the swarm."""
        return self._swarm

    @property
    def active_session(self) -> InferenceSession | None:
        return self._active.get()

    @contextlib.contextmanager
    def inference_session(self, *, max_length: int) -> Iterator[InferenceSession]:
        """A new session of at most `max_length` tokens, active inside the block."""
        with InferenceSession(self._swarm, max_length) as session, self.use_session(session):
            yield session

    @contextlib.contextmanager
    def use_session(self, session: InferenceSession | None) -> Iterator[InferenceSession | None]:
        """Make an existing session the active one inside the block."""
        token = self._active.set(session)
        try:
            yield session
        finally:
            self._active.reset(token)

    def close(self) -> None:
        """Leave the swarm; done at the end of the program if nobody does it earlier."""
        self._finalizer()

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        session: InferenceSession | None = None,
        **kwargs: Any,
    ) -> Any:
        """Transformers' generate() through the swarm.

        In an active session, or with `session=`, `inputs` are the new tokens alone (None: go on with what there is)
        and the result holds the tokens after those of earlier calls, as in PETALS.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        self._refuse_unsupported(inputs, kwargs)
        session = session or self.active_session
        with contextlib.ExitStack() as held:
            if session is None:
                length = self._session_length(inputs, kwargs)
                session = held.enter_context(self.inference_session(max_length=length))
            else:
                held.enter_context(self.use_session(session))
            return self._generate_in(session, inputs, args, kwargs)

    def _generate_in(
        self, session: InferenceSession, inputs: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        previous = session.output_ids
        if previous is not None:
            if (kwargs.get("num_beams") or 1) > 1:
                warnings.warn(
                    "beams of an earlier generate() in this session are lost: only the best one goes on", stacklevel=3
                )
            inputs = previous if inputs is None else torch.cat([previous, inputs.to(previous.device)], dim=1)
        if inputs is not None:
            kwargs["attention_mask"] = torch.ones_like(inputs)
        result = self._local_generate(inputs, *args, past_key_values=session.cache, **kwargs)
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        session.output_ids = sequences
        fresh = sequences if previous is None else sequences[:, previous.shape[1] :].clone()
        if isinstance(result, torch.Tensor):
            return fresh
        result.sequences = fresh
        return result

    def _local_generate(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        return parent.generate(*args, **kwargs)

    def _refuse_unsupported(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        for name in _NEEDS_A_LOCAL_CACHE:
            if kwargs.get(name):
                raise UnsupportedInput(
                    f"{name} takes tokens back from the cache, which servers do not do: leave it out."
                )
        mask = kwargs.pop("attention_mask", None)
        if mask is None and inputs is not None and inputs.shape[0] > 1:
            pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
            if pad is not None and pad not in (eos if isinstance(eos, list) else [eos]):
                mask = inputs != pad
        if mask is not None and not bool(mask.bool().all()):
            raise UnsupportedInput(
                "the prompts of a batch must have the same length: generate prompts of unequal length one by one."
            )

    def _session_length(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> int:
        """Tokens to reserve on the servers: the prompt and all that generate() may add."""
        if inputs is None:
            embeds = kwargs.get("inputs_embeds")
            prompt = 1 if embeds is None else int(embeds.shape[1])
        else:
            prompt = int(inputs.shape[1])
        config = kwargs.get("generation_config") or self.generation_config
        new_tokens = kwargs.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
        if new_tokens is not None:
            return prompt + int(new_tokens)
        total = kwargs.get("max_length") or getattr(config, "max_length", None) or 0
        return max(int(total), prompt + (0 if kwargs.get("max_length") else _DEFAULT_NEW_TOKENS))

    def _run_blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        """What stands in the place of the model's blocks."""
        if hidden.requires_grad and torch.is_grad_enabled():
            raise UnsupportedInput("gradients do not pass through remote blocks: call the model under torch.no_grad().")
        session = self.active_session
        if session is None:
            output = self._swarm.run(self._swarm.forward_async(hidden.detach().cpu()))
            return output.to(device=hidden.device, dtype=hidden.dtype)
        return session.step(hidden, session.cache.take_hypo_ids())

    def _cache_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Make forward() use the active session's cache, or none; a cache of another kind would be silently empty."""
        cache = kwargs.get("past_key_values")
        session = self.active_session
        if session is not None:
            if cache is not None and cache is not session.cache:
                raise UnsupportedInput("inside a session past_key_values is the session's own: leave it out.")
            return {**kwargs, "past_key_values": session.cache, "use_cache": True}
        if cache is not None and not (isinstance(cache, RemoteCache) or cache.get_seq_length() == 0):
            raise UnsupportedInput(
                "past_key_values is held by the servers: use model.inference_session(max_length=...)."
            )
        return {**kwargs, "past_key_values": None, "use_cache": False}


def _distributed(loaded: PreTrainedModel, swarm: SwarmClient, stack: Any) -> DistributedModel:
    """Give the hollow model the methods of DistributedModel, in front of those of its own class."""
    own_class = type(loaded)

    @functools.wraps(own_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask.bool().all()):
            raise UnsupportedInput(
                "padded inputs are not computed correctly by remote blocks: pass sequences of equal length."
            )
        return own_class.forward(self, *args, **self._cache_arguments(kwargs))

    members = {"forward": forward, "__module__": own_class.__module__}
    loaded.__class__ = type(own_class.__name__, (DistributedModel, own_class), members)
    model = cast(DistributedModel, loaded)
    model._swarm = swarm
    model._active = ContextVar("geopetals_session", default=None)
    model._finalizer = weakref.finalize(model, swarm.close)
    weak = weakref.ref(model)

    def call(hidden: torch.Tensor) -> torch.Tensor:
        alive = weak()
        assert alive is not None
        return alive._run_blocks(hidden)

    stack.call = call
    return model


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
