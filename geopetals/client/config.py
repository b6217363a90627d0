"""What a person may tell the client library; names are PETALS' where PETALS has the option."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Times in seconds.

    `request_timeout`: one step on one server. `connect_timeout`: opening a stream. `update_period`: how old the list of
    servers may be when a session starts. `max_retries`: other chains tried before a step fails. `full_timeout`: how
    long to wait for attention cache when every server that could help is full. `ban_timeout`: how long a server that
    failed is avoided. `recovery_timeout`: how long to wait, in the middle of a session, for somebody to serve blocks
    that nobody has any more. `push`: whether servers push to each other. `trace`: whether each step is timed on its
    way. `allowed_servers` and `blocked_servers` are peer ids.
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
    push: bool = True
    trace: bool = False
    allowed_servers: tuple[str, ...] | None = None
    blocked_servers: tuple[str, ...] = ()
