"""A device that takes a stated time, for benchmarks on machines without GPUs. Imports nothing but the standard library:
stock PETALS' start script uses it as it stands.

A step holds the device for max(what it really computes, what the curve says), one step at a time:

    decode step of b sessions through n blocks     n * (weights_s + session_s * b)
    prefill of t tokens through n blocks           n * (fixed_s + token_s * t)

The weights of a block are read once for all sessions of a step: batching helps as on a GPU, and no more.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

EMULATED_NAME = "EMULATED DEVICE "
"""What the public name of a stock server on an emulated device begins with; its DeviceSpec follows, as JSON."""
_SPIN_S = 0.0003
"""What is left to wait for awake: time.sleep() comes back 0.05 to 0.2 ms late on an idle machine."""
_FOLLOWS_WITHIN_S = 0.001
_MOST_MADE_UP_S = 0.0005
_BUCKETS_MS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, math.inf)
_BUCKETS = (*(f"{limit:g}" for limit in _BUCKETS_MS[:-1]), "more")
_COUNTS = ("busy_s", "steps", "overruns", "late_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """Seconds per block, as in a cluster file's `decode_block` and `prefill_block`; `memory_bytes` None: the machine's.

    `dilation` multiplies all times: with links that are slowed down alike, the machine has that much more time to
    compute, and results divided by it are those of the device described. Raises ValueError for what no device does.
    """

    weights_s: float
    session_s: float = 0.0
    fixed_s: float = 0.0
    token_s: float = 0.0
    memory_bytes: int | None = None
    dilation: float = 1.0

    def __post_init__(self) -> None:
        for name in ("weights_s", "session_s", "fixed_s", "token_s"):
            if not 0 <= getattr(self, name) <= 3600:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 to 3600 seconds")
        if self.decode_s(blocks=1, sessions=1) <= 0:
            raise ValueError("a decode step takes no time at all: give weights_s or session_s")
        if not 0 < self.dilation <= 1000:
            raise ValueError(f"dilation is {self.dilation}: give a number above 0, up to 1000")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ValueError(f"memory_bytes is {self.memory_bytes}: give at least 1")

    def decode_s(self, *, blocks: int, sessions: int) -> float:
        """Seconds on the wall clock for one token of each of that many sessions."""
        return self.dilation * blocks * (self.weights_s + self.session_s * sessions)

    def prefill_s(self, *, blocks: int, tokens: int) -> float:
        """Seconds on the wall clock for that many tokens of a prompt, all sequences together."""
        return self.dilation * blocks * (self.fixed_s + self.token_s * tokens)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Raises ValueError."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise ValueError(f"unknown {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        try:
            numbers = {key: None if number is None else float(number) for key, number in value.items()}
            if (memory := numbers.get("memory_bytes")) is not None:
                numbers["memory_bytes"] = int(memory)
            return cls(**numbers)  # type: ignore[arg-type]
        except (TypeError, OverflowError) as error:
            raise ValueError(str(error)) from error


def read_status(value: object) -> dict[str, Any] | None:
    """`EmulatedDevice.status()` as another peer sent it; None if it sent none, or what is none."""
    if not isinstance(value, dict) or not isinstance(late := value.get("late_ms"), dict):
        return None
    try:
        spec = DeviceSpec.from_dict({key: number for key, number in value.items() if key not in _COUNTS})
        counts = {name: float(value[name]) for name in ("busy_s", "steps", "overruns")}
        return {**spec.to_dict(), **counts, "late_ms": {name: int(late[name]) for name in _BUCKETS}}
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


class EmulatedDevice:
    """One device. For one thread: steps are serialized by whoever computes."""

    def __init__(
        self,
        spec: DeviceSpec,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.spec = spec
        self.busy_s = 0.0
        self.steps = 0
        self.overruns = 0
        """Steps whose real computing took longer than the curve says: the emulation does not hold for them."""
        self._clock, self._sleep = clock, sleep
        self._late = [0] * len(_BUCKETS_MS)
        self._left_at = -math.inf
        self._overslept_s = 0.0

    @contextlib.contextmanager
    def hold(self, *, blocks: int, sessions: int, tokens: int = 1) -> Iterator[None]:
        """Compute inside the block; it is left when the device would be done.

        `tokens` of each of `sessions` sequences go through `blocks` blocks: one token is a decode step, more a prefill.
        """
        began = self._clock()
        if began - self._left_at < _FOLLOWS_WITHIN_S:
            # Late wake-ups must not add up over steps that follow one another; but on a machine so busy that they are
            # later than this, no step may seem faster than the device.
            began -= min(self._overslept_s, _MOST_MADE_UP_S)
        yield
        if tokens == 1:
            takes_s = self.spec.decode_s(blocks=blocks, sessions=sessions)
        else:
            takes_s = self.spec.prefill_s(blocks=blocks, tokens=tokens * sessions)
        self._wait_until(began + takes_s)
        self.busy_s += takes_s
        self.steps += 1

    def lateness(self) -> dict[str, int]:
        """How many steps ended up to that many ms late."""
        return dict(zip(_BUCKETS, self._late, strict=True))

    def status(self) -> dict[str, Any]:
        """The curve, and how well it was kept."""
        figures = {"busy_s": self.busy_s, "steps": self.steps, "overruns": self.overruns}
        return {**self.spec.to_dict(), **figures, "late_ms": self.lateness()}

    def _wait_until(self, end: float) -> None:
        left_s = end - self._clock()
        if left_s < 0:
            self.overruns += 1
            self._left_at, self._overslept_s = end - left_s, 0.0
            return
        if left_s > _SPIN_S:
            self._sleep(left_s - _SPIN_S)
        while (now := self._clock()) < end:
            self._sleep(0)  # gives way to other threads: this interpreter's event loop is one of them
        self._left_at, self._overslept_s = now, now - end
        late_ms = self._overslept_s * 1000
        self._late[next(i for i, limit in enumerate(_BUCKETS_MS) if late_ms <= limit)] += 1
