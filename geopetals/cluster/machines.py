"""Servers, with their memory and speed, and the clients that ask them."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NewType, Self

from geopetals.cluster.errors import ClusterError
from geopetals.cluster.hardware import GPUS
from geopetals.cluster.kinds import Amount, Blocks, Choice, Files, Flag, Name, Number, Schema, Whole
from geopetals.cluster.quantities import BANDWIDTH, DURATION, MEMORY, RATE
from geopetals.cluster.records import Entry, Nested, Record

ServerId = NewType("ServerId", str)
ClientId = NewType("ClientId", str)
PlaceId = NewType("PlaceId", str)

_TIME = Amount(DURATION, most=86400)
_LINE = Amount(BANDWIDTH, least=1000, most=1e15)
DEFAULT_OVERHEAD_S = 0.001  # software per hop, measured on loopback: 0.9 ms


class _Timing(Record):
    """A time, or a mapping of two."""

    __slots__ = ()
    _FIXED: ClassVar[str]
    """What a time alone stands for."""

    @classmethod
    def from_value(cls, value: object, files: Files) -> Self:
        if isinstance(value, dict):
            return super().from_value(value, files)
        return cls(**{cls._FIXED: _TIME.read(value, files)})

    @classmethod
    def schema(cls) -> Schema:
        return {"oneOf": [_TIME.schema(), super().schema()]}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTime(_Timing):
    """One block, one decode step for b sessions at once: weights_s + session_s * b. A time alone holds for any b."""

    WHAT = "time of a decode step"
    _FIXED = "weights_s"

    weights_s: Annotated[float, Entry("weights", _TIME, "reading one block's weights, once per step")]
    session_s: Annotated[float, Entry("per_session", _TIME, "what each session of a step adds")] = 0.0

    def _check(self) -> None:
        if self.for_sessions(1) <= 0:
            raise ClusterError((), "a decode step takes no time at all: give the time per block.")

    def for_sessions(self, sessions: int) -> float:
        """Seconds per block for a step of that many sessions."""
        return self.weights_s + self.session_s * sessions

    def to_value(self) -> Any:
        return _TIME.write(self.weights_s) if self.session_s == 0 else Record.to_value(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTime(_Timing):
    """One block, a prompt of n tokens: fixed_s + token_s * n. A time alone holds for the workload's prompt."""

    WHAT = "time of a prefill"
    _FIXED = "fixed_s"

    fixed_s: Annotated[float, Entry("fixed", _TIME, "what any prompt takes")] = 0.0
    token_s: Annotated[float, Entry("per_token", _TIME, "what each token of the prompt adds")] = 0.0

    def for_tokens(self, tokens: int) -> float:
        """Seconds per block for a prompt of that many tokens."""
        return self.fixed_s + self.token_s * tokens

    def to_value(self) -> Any:
        return _TIME.write(self.fixed_s) if self.token_s == 0 else Record.to_value(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec(Record):
    """A machine that may hold blocks. Its times are measured, or estimated from its type of GPU."""

    WHAT = "server"

    id: Annotated[ServerId, Entry("name", Name(), "what the server is called")]
    memory_bytes: Annotated[
        int,
        Entry(
            "memory",
            Amount(MEMORY, positive=True, most=1e18),
            "memory for blocks and attention cache, without what else needs it",
        ),
    ]
    gpu: Annotated[str | None, Entry("gpu", Choice(*GPUS), "type of GPU, to estimate the times that are not given")] = (
        None
    )
    decode_block: Annotated[
        DecodeTime | None, Entry("decode_block", Nested(DecodeTime), "time of one decode step in one block")
    ] = None
    prefill_block: Annotated[
        PrefillTime | None, Entry("prefill_block", Nested(PrefillTime), "time of a prompt in one block")
    ] = None
    overhead_s: Annotated[float, Entry("overhead", _TIME, "software's time per hop, beside the block's")] = (
        DEFAULT_OVERHEAD_S
    )
    max_blocks: Annotated[int | None, Entry("max_blocks", Whole(), "most blocks the server may hold")] = None
    blocks: Annotated[tuple[int, int] | None, Entry("blocks", Blocks(), "blocks that it holds and that must stay")] = (
        None
    )
    place: Annotated[PlaceId | None, Entry("place", Name(), "where in the network it stands")] = None
    bandwidth_bit_per_s: Annotated[
        float | None,
        Entry("bandwidth", _LINE, "the slower direction of its line; none: it never limits"),
    ] = None
    relayed: Annotated[bool, Entry("relayed", Flag(), "whether it is reached through a relay only")] = False

    def _check(self) -> None:
        for key, time in (("decode_block", self.decode_block), ("prefill_block", self.prefill_block)):
            if time is None and self.gpu is None:
                raise ClusterError((), f"there is no {key}: give it as measured, or a gpu to estimate it from.")
        if self.blocks is not None and self.max_blocks is not None:
            held = self.blocks[1] - self.blocks[0]
            if held > self.max_blocks:
                raise ClusterError(
                    ("blocks",), f"these are {held} blocks, but max_blocks is {self.max_blocks}: raise it."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSpec(Record):
    """Where people sit who ask, and how often: by a rate of their own, or by their share of the workload's arrivals."""

    WHAT = "client"

    id: Annotated[ClientId, Entry("name", Name(), "what the client is called")]
    place: Annotated[PlaceId | None, Entry("place", Name(), "where in the network it stands")] = None
    requests_per_s: Annotated[
        float | None,
        Entry("requests", Amount(RATE, most=1e6), "sessions it starts, where workload.arrivals is not given"),
    ] = None
    share: Annotated[
        float, Entry("share", Number(least=0, most=1e9, positive=True), "its weight in workload.arrivals")
    ] = 1.0
    bandwidth_bit_per_s: Annotated[float | None, Entry("bandwidth", _LINE, "the slower direction of its line")] = None
