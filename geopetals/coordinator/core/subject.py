"""What plans are made of, as cheap to put together as can be: for hundreds of servers a Cluster takes long to make."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from geopetals.cluster import Cluster, DecodeTime, PrefillTime, ServerId, ServerSpec
from geopetals.coordinator.core.settings import ModelFacts
from geopetals.coordinator.core.view import Work, plan_cluster
from geopetals.coordinator.messages import Span
from geopetals.problem import Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """The swarm at one instant. `rtts`: as Links.matrix gives them for plan_clients(work) and these servers."""

    model: ModelFacts
    work: Work
    servers: tuple[ServerSpec, ...]
    rtts: Floats
    name: str | None = None

    @cached_property
    def cluster(self) -> Cluster:
        """The cluster on which `geopetals plan` gives the coordinator's plan."""
        return plan_cluster(self.model, self.work, self.servers, self.rtts, name=self.name)

    def names(self) -> list[str]:
        """Of the servers."""
        return [str(server.id) for server in self.servers]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that msgpack can hold, exactly: for another process of this release."""
        return {
            "model": self.model.to_dict(),
            "work": asdict(self.work),
            "servers": [asdict(server) for server in self.servers],
            "rtts": [list(self.rtts.shape), self.rtts.tobytes()],
            "name": self.name,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Subject":
        shape, data = raw["rtts"]
        return cls(
            model=ModelFacts.from_dict(raw["model"]),
            work=Work(**raw["work"]),
            servers=tuple(map(_spec, raw["servers"])),
            rtts=np.frombuffer(data, dtype=np.float64).reshape(shape),
            name=raw["name"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanJob:
    """Everything a plan depends on."""

    number: int
    subject: Subject
    holding: Mapping[str, Span]
    """What servers hold or are about to hold; the others are idle."""
    horizon_s: float = 3600.0
    block_load_s: float = 0.0
    """What loading a block takes, in the mean."""
    seed: int = 0

    @property
    def cluster(self) -> Cluster:
        return self.subject.cluster

    def to_dict(self) -> dict[str, Any]:
        """See Subject.to_dict."""
        return {
            "number": self.number,
            "subject": self.subject.to_dict(),
            "holding": {peer: list(span) for peer, span in self.holding.items()},
            "horizon_s": self.horizon_s,
            "block_load_s": self.block_load_s,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "PlanJob":
        holding = {peer: Span(*span) for peer, span in raw["holding"].items()}
        return cls(**{**raw, "subject": Subject.from_dict(raw["subject"]), "holding": holding})


def _spec(raw: dict[str, Any]) -> ServerSpec:
    decode, prefill, blocks = raw["decode_block"], raw["prefill_block"], raw["blocks"]
    fields = {
        **raw,
        "id": ServerId(raw["id"]),
        "decode_block": None if decode is None else DecodeTime(**decode),
        "prefill_block": None if prefill is None else PrefillTime(**prefill),
        "blocks": None if blocks is None else tuple(blocks),
    }
    return ServerSpec(**fields)
