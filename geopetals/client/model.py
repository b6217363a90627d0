"""`AutoDistributedModelForCausalLM`: a Transformers model whose blocks run in a swarm."""

import contextlib
import functools
import inspect
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from transformers import GenerationMixin, PreTrainedModel

from geopetals.client.autograd import through_swarm
from geopetals.client.hollow import RemoteStack
from geopetals.client.opening import open_hollow_model
from geopetals.client.padding import AnySession, PaddedSession, left_padding
from geopetals.client.ptune import add_prompts, check_tuning, deep_prompts
from geopetals.client.session import InferenceSession
from geopetals.client.swarm import SwarmClient
from geopetals.errors import UnsupportedInput
from geopetals.join_token import JoinToken
from geopetals.progress import Reporter

Kind = TypeVar("Kind", bound="DistributedModel")
_DEFAULT_NEW_TOKENS = 20
_NEEDS_A_LOCAL_CACHE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha")


class AutoDistributedModelForCausalLM:
    """Opens a model whose embeddings and head are here and whose blocks are in a swarm."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        join: str | JoinToken | None = None,
        initial_peers: Sequence[str] = (),
        dht_prefix: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: str = "cpu",
        tuning_mode: str | None = None,
        pre_seq_len: int = 0,
        reporter: Reporter | None = None,
        **options: Any,
    ) -> "DistributedModel":
        """`model` is a Hub id or a local directory (default: the token's); `join` a token as `geopetals serve` prints
        it.

        Instead of a token, `initial_peers` (libp2p addresses) and, where the swarm's name is not the model's,
        `dht_prefix` may be given, as in PETALS. `tuning_mode` "ptune" or "deep_ptune" puts `pre_seq_len` trainable
        prompt vectors before every text. `options` are the fields of ClientConfig. Raises GeoPetalsError with one
        sentence when the model cannot be found, the swarm cannot be reached, or it serves another model.
        """
        check_tuning(tuning_mode, pre_seq_len)
        opened = open_hollow_model(
            model,
            join=join,
            initial_peers=initial_peers,
            dht_prefix=dht_prefix,
            revision=revision,
            dtype=dtype,
            device=device,
            reporter=reporter,
            options=options,
        )
        add_prompts(opened.model, tuning_mode, pre_seq_len)
        return connect_model(opened.model, opened.swarm, opened.stack, DistributedModel)


class DistributedModel(PreTrainedModel, GenerationMixin):
    """What `from_pretrained` returns: the model's own Transformers class with these methods in front of its own.

    A session is active inside `with model.inference_session(max_length=...)`; `generate()` and `forward()` then go on
    where the session is. Outside, `generate()` opens one for itself and `forward()` runs without a cache and can be
    differentiated. The model's own parameters are frozen, trainable prompts are not.
    """

    _swarm: SwarmClient
    _active: ContextVar[AnySession | None]
    _generating: ContextVar[bool]
    _finalizer: Any

    @property
    def swarm(self) -> SwarmClient:
        """The connection to the swarm."""
        return self._swarm

    @property
    def active_session(self) -> AnySession | None:
        return self._active.get()

    @contextlib.contextmanager
    def inference_session(self, *, max_length: int, output_tokens: int | None = None) -> Iterator[InferenceSession]:
        """A new session for `max_length` tokens, active inside the block. Trainable prompts come on top.

        `output_tokens`: how many of them will be generated, where that is known; a coordinator plans with it.
        """
        prefix = self._prefix_tokens
        session = InferenceSession(self._swarm, max_length + prefix, prefix_tokens=prefix, output_tokens=output_tokens)
        with session, self.use_session(session):
            yield session

    @contextlib.contextmanager
    def use_session(self, session: AnySession | None) -> Iterator[AnySession | None]:
        """Make an existing session the active one inside the block."""
        if session is not None and session.prefix_tokens != self._prefix_tokens:
            raise UnsupportedInput(
                "the session has not as many tuned prompts as this model: use model.inference_session(), and texts of "
                "equal length."
            )
        token = self._active.set(session)
        try:
            yield session
        finally:
            self._active.reset(token)

    @property
    def _prefix_tokens(self) -> int:
        return getattr(self.base_model, "pre_seq_len", 0)

    def close(self) -> None:
        """Leave the swarm; done at the end of the program if nobody does it earlier."""
        self._finalizer()

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        session: AnySession | None = None,
        **kwargs: Any,
    ) -> Any:
        """Transformers' generate() through the swarm.

        In an active session, or with `session=`, `inputs` are the new tokens alone (None: go on with what there is)
        and the result holds the tokens after those of earlier calls, as in PETALS.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        self._refuse_unsupported(kwargs)
        mask = self._padding_mask(inputs, kwargs.pop("attention_mask", None))
        session = session or self.active_session
        with contextlib.ExitStack() as held:
            if session is not None:
                if mask is not None:
                    raise UnsupportedInput("inside a session the prompts of a batch must have the same length.")
                held.enter_context(self.use_session(session))
                return self._generate_in(session, inputs, args, kwargs)
            length, new_tokens = self._session_length(inputs, kwargs)
            if mask is None:
                session = held.enter_context(self.inference_session(max_length=length, output_tokens=new_tokens))
                return self._generate_in(session, inputs, args, kwargs)
            padded = held.enter_context(
                PaddedSession(self._swarm, length, left_padding(mask), output_tokens=new_tokens)
            )
            held.enter_context(self.use_session(padded))
            return self._generate_in(padded, inputs, args, {**kwargs, "attention_mask": mask})

    def _generate_in(
        self, session: AnySession, inputs: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        previous = session.output_ids
        known = 0 if previous is None else previous.shape[1]
        if session.position - session.prefix_tokens > known:
            raise UnsupportedInput(
                "the session has processed tokens that generate() did not return, as after an error: open a new one."
            )
        if previous is not None:
            if (kwargs.get("num_beams") or 1) > 1:
                warnings.warn(
                    "beams of an earlier generate() in this session are lost: only the best one goes on", stacklevel=3
                )
            inputs = previous if inputs is None else torch.cat([previous, inputs.to(previous.device)], dim=1)
        if inputs is not None:
            kwargs.setdefault("attention_mask", torch.ones_like(inputs))
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
        token = self._generating.set(True)
        try:
            return parent.generate(*args, **kwargs)
        finally:
            self._generating.reset(token)

    def _refuse_unsupported(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or self.generation_config
        use_cache = kwargs.get("use_cache", getattr(config, "use_cache", None))
        if use_cache is False:
            raise UnsupportedInput("the servers keep the attention cache: leave use_cache=False out.")
        for name in (*_NEEDS_A_LOCAL_CACHE, "guidance_scale"):
            value = kwargs.get(name, getattr(config, name, None))
            if value and not (name == "guidance_scale" and value == 1):
                raise UnsupportedInput(f"{name} needs a second attention cache or takes tokens back: leave it out.")

    def _padding_mask(self, inputs: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The attention mask if it masks anything; without one, padding is told by its token, as Transformers does."""
        if mask is None and inputs is not None:
            pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
            if pad is not None and pad not in (eos if isinstance(eos, list) else [eos]):
                mask = (inputs != pad).long()
        return None if mask is None or bool(mask.bool().all()) else mask

    def _session_length(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> tuple[int, int]:
        """Tokens to reserve on the servers: the prompt and all that generate() may add; and how many it may add."""
        if inputs is None:
            embeds = kwargs.get("inputs_embeds")
            prompt = 1 if embeds is None else int(embeds.shape[1])
        else:
            prompt = int(inputs.shape[1])
        config = kwargs.get("generation_config") or self.generation_config
        new_tokens = kwargs.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
        if new_tokens is not None:
            return prompt + int(new_tokens), int(new_tokens)
        total = kwargs.get("max_length") or getattr(config, "max_length", None) or 0
        length = max(int(total), prompt + (0 if kwargs.get("max_length") else _DEFAULT_NEW_TOKENS))
        return length, length - prompt

    def _run_blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        """What stands in the place of the model's blocks."""
        session = self.active_session
        if session is None:
            return through_swarm(self._swarm, hidden, deep_prompts(self))
        if hidden.requires_grad and torch.is_grad_enabled():
            raise UnsupportedInput(
                "gradients do not pass through an inference session: train outside of it, or use torch.no_grad()."
            )
        order = session.cache.take_hypo_ids()
        prompts = deep_prompts(self) if session.position == 0 else None
        if not (self._generating.get() and hidden.shape[1] > 1):
            return session.step(hidden, order, prompts)
        output = torch.zeros_like(hidden)  # generate() looks at the last position alone
        output[:, -1:] = session.step(hidden, order, prompts, last_only=True)
        return output

    def _cache_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Make forward() use the active session's cache, or none; a cache of another kind would be silently empty."""
        cache = kwargs.get("past_key_values")
        session = self.active_session
        if session is not None:
            if cache is not None and cache is not session.cache:
                raise UnsupportedInput("inside a session past_key_values is the session's own: leave it out.")
            return {**kwargs, "past_key_values": session.cache, "use_cache": True}
        if cache is not None and cache.get_seq_length() > 0:
            raise UnsupportedInput(
                "past_key_values is held by the servers: use model.inference_session(max_length=...)."
            )
        return {**kwargs, "past_key_values": None, "use_cache": False}

    def _refuse_what_blocks_do_not_see(self, own_class: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remote blocks compute positions and masks themselves, and return the last hidden states alone."""
        given = kwargs
        if args:
            names = list(inspect.signature(own_class.forward).parameters)[1:]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in ("output_hidden_states", "output_attentions"):
            if given.get(name):
                raise UnsupportedInput(f"{name} asks for what stays on the servers: leave it out.")
        mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise UnsupportedInput("attention_mask must be [batch, tokens]: remote blocks take no other mask.")
        positions = given.get("position_ids")
        if positions is not None and self.active_session is None:
            usual = torch.arange(positions.shape[-1], device=positions.device)
            if not bool((positions == usual).all()):
                raise UnsupportedInput("remote blocks count positions from 0 themselves: leave position_ids out.")

    def _mask_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Remote blocks see no mask. Padding after the text needs none, as tokens do not look ahead."""
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or bool(mask.bool().all()):
            return kwargs
        if isinstance(self.active_session, PaddedSession):
            return kwargs
        text_comes_first = not bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()) and bool(mask[:, 0].all())
        if self.active_session is not None or not text_comes_first:
            raise UnsupportedInput(
                "padded inputs are not computed correctly by remote blocks: pass sequences of equal length, or outside "
                "of sessions pad on the right."
            )
        return {**kwargs, "attention_mask": None}


def connect_model(loaded: PreTrainedModel, swarm: SwarmClient, stack: RemoteStack, kind: type[Kind]) -> Kind:
    """Give the hollow model the methods of `kind`, in front of those of its own class, and the swarm for its blocks."""
    own_class = type(loaded)

    @functools.wraps(own_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._refuse_what_blocks_do_not_see(own_class, args, kwargs)
        return own_class.forward(self, *args, **self._mask_arguments(self._cache_arguments(kwargs)))

    forward.__signature__ = inspect.signature(own_class.forward)  # type: ignore[attr-defined] # asked for each token
    members = {"forward": forward, "__module__": own_class.__module__}
    loaded.__class__ = type(own_class.__name__, (kind, own_class), members)
    model = cast(Kind, loaded)
    model._swarm = swarm
    model._active = ContextVar("geopetals_session", default=None)
    model._generating = ContextVar("geopetals_generating", default=False)
    model._finalizer = weakref.finalize(model, swarm.close)
    weak = weakref.ref(model)

    def call(hidden: torch.Tensor) -> torch.Tensor:
        alive = weak()
        assert alive is not None
        return alive._run_blocks(hidden)

    stack.call = call
    return model
