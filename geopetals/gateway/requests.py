"""The requests of OpenAI's API, as far as a swarm can answer them; what it cannot is refused by the field's name.

Fields that only concern OpenAI's own service (user, metadata, store and the like) are ignored, as other servers do.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from geopetals.gateway.errors import ApiError

MOST_CHOICES, MOST_STOPS, MOST_PROMPTS = 8, 4, 16
_MOST_MESSAGES = 4096
_MOST_TOKENS = 10**6
_MOST_STOP_CHARACTERS = 200
_UNSUPPORTED = {
    "tools": (None, []),
    "functions": (None, []),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "echo": (None, False),
    "prediction": (None,),
    "function_call": (None, "none", "auto"),
    "tool_choice": (None, "none", "auto"),
    "reasoning_effort": (None, "none"),
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
    "repetition_penalty": (None, 1),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "stop_token_ids": (None, []),
}

Kind = TypeVar("Kind", bound="GenerationRequest")
Penalty = Annotated[float, Field(ge=-2.0, le=2.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Token = Annotated[int, Field(ge=0)]
# The first mistake is enough: one error for each of a million elements takes a gigabyte.
Tokens = Annotated[list[Token], Field(min_length=1, max_length=_MOST_TOKENS, fail_fast=True)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(strict=True)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """A null is the default, as in OpenAI's API."""
        if not isinstance(value, dict):
            return value
        for name, harmless in _UNSUPPORTED.items():
            if value.get(name) not in harmless:
                raise ApiError(400, f"{name} is not supported: leave it out.", param=name, code="unsupported_parameter")
        return {name: each for name, each in value.items() if each is not None}

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if any(not 0 < len(stop) <= _MOST_STOP_CHARACTERS for stop in stops):
            raise ValueError(f"each text has 1 to {_MOST_STOP_CHARACTERS} characters")
        return value

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for stream=true alone.", param="stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=_MOST_MESSAGES, fail_fast=True)]

    def plain(self) -> dict[str, str]:
        """As chat templates take it, which know no developers."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most; None: the server's default."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many other tokens to name beside each; None: none, and not its own probability either."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    max_tokens: Count = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """See ChatRequest."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


AnyRequest = ChatRequest | CompletionRequest


def read_request(body: bytes, kind: type[Kind]) -> Kind:
    """Raises ApiError that names the field which is wrong."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no valid JSON.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body has to be a JSON object.", code="invalid_json")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half a character (a lone surrogate).", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply.", code="invalid_json") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ApiError:
    """The first mistake; of a field that has several forms, that of the form which was meant: it goes deepest."""
    errors = error.errors(include_url=False, include_input=False)
    field = errors[0]["loc"][:1]
    first = max((each for each in errors if each["loc"][:1] == field), key=lambda each: len(each["loc"]))
    where = [str(part) for part in first["loc"] if not _is_form(part)]
    param = ".".join(where) or None
    missing = first["type"] == "missing"
    message = f"{param} is missing." if missing else f"{param}: {first['msg'].removeprefix('Value error, ')}."
    return ApiError(400, message, param=param, code="missing_required_parameter" if missing else "invalid_value")


def _is_form(part: str | int) -> bool:
    """pydantic names the member of a union that it tried: `str`, `list[str]`, `list[TextPart]`."""
    return isinstance(part, str) and (part in ("str", "int") or part.startswith(("list[", "constrained-", "function-")))
