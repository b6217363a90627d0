"""What a person may tell the client library; names are PETALS' where PETALS has the option."""

from collections.abc import Callable
from dataclasses import dataclass

from geopetals.client.lease import Waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Times in seconds.

    `request_timeout`: one step on one server. `connect_timeout`: opening a stream. `update_period`: how old the list of
    servers may be when a session starts. `max_retries`: other chains tried before a step fails. `full_timeout`: how
    long to wait for attention cache when every server that could help is full. `ban_timeout`: how long a server that
    failed is avoided. `recovery_timeout`: how long to wait, in the middle of a session, for somebody to serve blocks
    that nobody has any more, or who has them to have cache. `queue_timeout`: how long a session may wait in the
    coordinator's queue. `coordinator_timeout`: how long a coordinator that does not answer is waited for before new
    sessions go without it. `on_wait` is called, on the client's own thread, with what a session waits for; it must not
    block. `push`: whether servers push to each other. `trace`: whether each step is timed on its way.
    `allowed_servers` and `blocked_servers` are peer ids. `spot_check_rate`: the share of steps that are computed again
    with other servers, to find out who answers wrongly; each costs as much as the whole session's prompt.
    """

    request_timeout: float = 180.0
    connect_timeout: float = 10.0
    update_period: float = 30.0
    max_retries: int = 5
    min_backoff: float = 0.5
    max_backoff: float = 10.0
    full_timeout: float = 60.0
    ban_timeout: float = 15.0
    ping_timeout: float = 3.0
    recovery_timeout: float = 60.0
    queue_timeout: float = 600.0
    coordinator_timeout: float = 10.0
    on_wait: Callable[[Waiting], object] | None = None
    push: bool = True
    trace: bool = False
    allowed_servers: tuple[str, ...] | None = None
    blocked_servers: tuple[str, ...] = ()
    spot_check_rate: float = 0.0
