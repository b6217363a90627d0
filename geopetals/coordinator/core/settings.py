"""What the coordinator is told about its model, and the numbers by which it decides."""

from dataclasses import dataclass

from geopetals.coordinator.codec import Message
from geopetals.errors import UnsupportedInput


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts(Message):
    """The model as it is served. Bytes are of one block, and of one token in one block or on the wire."""

    name: str
    num_blocks: int
    hidden_size: int
    block_bytes: int
    kv_bytes_per_token: int
    hidden_bytes_per_token: int
    head_groups: int = 1
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_blocks", "hidden_size", "block_bytes", "kv_bytes_per_token", "hidden_bytes_per_token"):
            if getattr(self, name) < 1:
                raise UnsupportedInput(f"{name} is {getattr(self, name)}: give a number of at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Message):
    """Times in seconds. The defaults hold before anything was measured, or where nothing better is known."""

    page_tokens: int = 32
    """Attention cache is counted in pages of so many tokens for each block."""

    prompt_tokens: int = 128
    output_tokens: int = 128
    arrivals_per_s: float = 0.1
    """Sessions to plan for until enough have come; never fewer than a tenth of these."""
    demand_window_s: float = 600.0
    default_rtt_s: float = 0.05
    """Between members of which nothing was measured."""

    settle_s: float = 2.0
    """A plan waits until nothing has happened for so long,"""
    settle_most_s: float = 10.0
    """but not longer."""
    replan_s: float = 30.0
    """Between two plans, unless servers have come or gone."""
    horizon_s: float = 3600.0
    """Over which a new plan has to earn what moving costs."""
    check_demand_s: float = 60.0
    """Between two looks at whether demand has drifted."""
    drift: float = 0.3
    """Relative change of load, or of session time by links, that asks for a new plan."""
    drain_s: float = 30.0
    """The longest that a server waits for its sessions before it moves."""
    load_bytes_per_s: float = 1e8
    """Of servers that have not measured it."""
    load_timeout_s: float = 900.0
    penalty_s: float = 300.0
    """A server that failed to load keeps what it has for so long; doubled each time."""
    search_steps: int | None = None
    """Of the search for placements; None: as `geopetals plan`."""
    plan_inline: bool = True
    """Plans are made inside of Core.apply; otherwise by the action MakePlan."""

    server_grace_s: float = 5.0
    """A server whose channel is gone for so long is gone;"""
    return_s: float = 15.0
    """but for so long servers are waited for after an outage that is the coordinator's own."""
    silent_s: float = 30.0
    """A server that has said nothing for so long is as one whose channel is gone."""
    lease_s: float = 10.0
    """Sessions of a client whose channel is gone end after so long."""
    idle_s: float = 900.0
    """A session whose servers see no new token for so long is over."""
    unseen_s: float = 60.0
    """A session that no server of its chain has seen after so long is over."""

    queue_length: int = 1000
    queue_per_client: int = 200
    queue_wait_s: float = 600.0
    """Sessions that would wait longer are refused."""
    lookahead: int = 64
    """So many waiting sessions hold promises; starts of the others are extrapolated."""

    reprice_s: float = 1.0
    """Between two times at which changed links are taken into account."""
    link_change: float = 0.2
    """Relative change of a link that is taken into account,"""
    link_change_s: float = 0.002
    """if it is also larger than this."""
    probes: int = 8
    """Links that a member is asked to measure at a time."""
    probe_s: float = 10.0
    """Between two measurements of the same links."""
    history: int = 200

    def __post_init__(self) -> None:
        for name in ("page_tokens", "prompt_tokens", "output_tokens", "queue_length", "queue_per_client", "lookahead"):
            if getattr(self, name) < 1:
                raise UnsupportedInput(f"{name} is {getattr(self, name)}: give a number of at least 1.")
        if not self.arrivals_per_s > 0:
            raise UnsupportedInput(f"arrivals_per_s is {self.arrivals_per_s}: give a number above 0.")
