"""Blocks that are computed here and take the time of an emulated device: see emulation.py."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from geopetals.swarm.emulation import EmulatedDevice
from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.stage import Stage


def emulate(stage: Stage, device: EmulatedDevice) -> Stage:
    """The stage as all that computes with it sees it, the profiler included. A backward pass takes its real time."""
    return cast(Stage, _EmulatedStage(stage, device))


class _EmulatedStage:
    def __init__(self, stage: Stage, device: EmulatedDevice) -> None:
        self._stage, self._device = stage, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def run(self, hidden: Tensor, start: int, end: int, *, kv: SessionKV | None = None) -> Tensor:
        if hidden.dim() != 3 or 0 in hidden.shape:
            return self._stage.run(hidden, start, end, kv=kv)
        with self._device.hold(blocks=end - start, sessions=hidden.shape[0], tokens=hidden.shape[1]):
            return self._stage.run(hidden, start, end, kv=kv)

    def decode(self, hidden: Tensor, start: int, end: int, sessions: Sequence[SessionKV]) -> Tensor:
        """As the stage does it: what it computes in one pass holds the device once."""
        if self._stage.batches:
            with self._device.hold(blocks=end - start, sessions=hidden.shape[0]):
                return self._stage.decode(hidden, start, end, sessions)
        parts = hidden.split([kv.batch for kv in sessions])
        return torch.cat([self.run(part, start, end, kv=kv) for part, kv in zip(parts, sessions, strict=True)])
