"""Every metric of GeoPETALS: names are vLLM's where vLLM has the quantity, under the prefix `geopetals_`.

One registry for each process. To count something is one to two microseconds, and happens where it happens.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

import geopetals

_PREFIX = "geopetals"
_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_REQUEST_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_SESSIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
CONTENT_TYPE = CONTENT_TYPE_LATEST


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, namespace=_PREFIX, registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, labels, namespace=_PREFIX, registry=REGISTRY)


def _histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
    return Histogram(name, text, labels, namespace=_PREFIX, registry=REGISTRY, buckets=buckets)


_HOP_SECONDS = _histogram("hop_seconds", "Where a step's time at a server goes", "stage")
HOP_QUEUE = _HOP_SECONDS.labels("queue")
HOP_COMPUTE = _HOP_SECONDS.labels("compute")
HOP_NETWORK = _HOP_SECONDS.labels("network")
HOP_SERIALIZE = _HOP_SECONDS.labels("serialize")
BATCH_SIZE = _histogram("decode_batch_size", "Sessions in one decode batch", buckets=_SESSIONS)
STEPS = _counter("steps", "Steps that were computed", "phase")
PREFILL_STEPS, DECODE_STEPS = STEPS.labels("prefill"), STEPS.labels("decode")
PROMPT_TOKENS = _counter(
    "prompt_tokens", "Of several-token steps, computed in all blocks asked for; at a gateway, of prompts"
)
GENERATION_TOKENS = _counter(
    "generation_tokens", "Of one-token steps, computed in all blocks asked for; at a gateway, of answers"
)
REQUESTS_REFUSED = _counter("requests_refused", "Requests of peers that were answered with an error", "reason")

REQUESTS_RUNNING = _gauge("num_requests_running", "Sessions that hold attention cache")
REQUESTS_WAITING = _gauge("num_requests_waiting", "Sessions that wait for attention cache")
KV_RESERVED = _gauge("kv_cache_reserved_block_tokens", "Attention cache reserved: tokens of one sequence in one block")
KV_TOTAL = _gauge("kv_cache_total_block_tokens", "Attention cache there is: tokens of one sequence in one block")
KV_USAGE = _gauge("kv_cache_usage_perc", "Share of the attention cache that is reserved, 0 to 1")

TIME_TO_FIRST_TOKEN = _histogram("time_to_first_token_seconds", "A client's first step, opening of the chain included")
INTER_TOKEN_LATENCY = _histogram("inter_token_latency_seconds", "A client's one-token steps, through all blocks")
FAILOVERS = _counter("failovers", "Chains of running sessions that a client had to replace", "reason")


REQUEST_SECONDS = _histogram(
    "e2e_request_latency_seconds", "A gateway's answers from their start to their last token", buckets=_REQUEST_SECONDS
)
REQUEST_QUEUE = _histogram(
    "request_queue_time_seconds", "How long answers waited for a place at the gateway", buckets=_REQUEST_SECONDS
)
REQUEST_SUCCESS = _counter("request_success", "A gateway's answers that were finished", "finished_reason")
API_REQUESTS = _counter("api_requests", "HTTP requests that a gateway has answered", "path", "status")
BUILD_INFO = Gauge("build_info", "Always 1", ["version"], namespace=_PREFIX, registry=REGISTRY)
BUILD_INFO.labels(geopetals.__version__).set(1)

SERVERS = _gauge("servers", "Block servers that a coordinator knows", "state")
BLOCKS_COVERED = _gauge("blocks_covered", "Blocks that some ready server holds")
BLOCK_REPLICAS = _gauge("block_replicas", "Ready servers that hold the block", "block")
PLACEMENT_CHANGES = _gauge("placement_changes", "Plans that a coordinator has adopted and still remembers")
LINK_RTT = _gauge("link_rtt_seconds", "Round trips that members have measured", "quantile")
PREDICTED = _gauge("predicted_seconds", "What was predicted of the last sessions, median", "what")
MEASURED = _gauge("measured_seconds", "What was measured of the last sessions, median", "what")
PREDICTION_RATIO = _gauge("prediction_ratio", "Measured over predicted, median of the last sessions", "what")
BOUND_RATIO = _gauge("bound_ratio", "Least time per token that a placement could give, over what was measured")
DECISION_SECONDS = _histogram("admission_decision_seconds", "From a client's question to the coordinator's answer")
SESSIONS = _gauge("sessions", "Sessions that a coordinator has decided on, since its state was new", "outcome")


def count_step(tokens: int, *, decode: bool) -> None:
    """A step that a server has computed; `tokens` over all of its sequences."""
    (DECODE_STEPS if decode else PREFILL_STEPS).inc()
    (GENERATION_TOKENS if decode else PROMPT_TOKENS).inc(tokens)


def watch_cache(
    *, total: int, reserved: Callable[[], int], running: Callable[[], int], waiting: Callable[[], int]
) -> None:
    """Have the gauges read a server's state when somebody asks for them. The last caller's is shown."""
    KV_TOTAL.set(total)
    KV_RESERVED.set_function(reserved)
    KV_USAGE.set_function(lambda: reserved() / total)
    REQUESTS_RUNNING.set_function(running)
    REQUESTS_WAITING.set_function(waiting)


def watch_requests(*, running: Callable[[], int], waiting: Callable[[], int]) -> None:
    """The same for who has requests and no cache: a gateway."""
    REQUESTS_RUNNING.set_function(running)
    REQUESTS_WAITING.set_function(waiting)


def show_swarm(status: dict[str, Any]) -> None:
    """Have the gauges show a coordinator's `status`, before somebody reads them."""
    states = [server["state"] for server in status["servers"]]
    for state in ("ready", "joining", "moving", "idle", "gone"):
        SERVERS.labels(state).set(states.count(state))
    caches = [server["cache"] for server in status["servers"] if server.get("cache")]
    total, free = (sum(cache[name] for cache in caches) for name in ("total", "free"))
    KV_TOTAL.set(total)
    KV_RESERVED.set(total - free)
    KV_USAGE.set((total - free) / total if total else 0.0)
    REQUESTS_RUNNING.set(status["running"])
    REQUESTS_WAITING.set(status["waiting"])
    BLOCKS_COVERED.set(sum(count > 0 for count in status["replicas"]))
    for what, count in status["counts"].items():
        SESSIONS.labels(what).set(count)
    for block, count in enumerate(status["replicas"]):
        BLOCK_REPLICAS.labels(str(block)).set(count)
    PLACEMENT_CHANGES.set(sum(entry["what"] == "plan adopted" for entry in status["history"]))
    _show_links(status["links"])
    _show_predictions(status)


def _show_links(links: dict[str, Any]) -> None:
    rtts = sorted(rtt_s for _, _, rtt_s, _ in links["measured"])
    for quantile in (0.5, 0.9, 1.0) if rtts else ():
        LINK_RTT.labels(f"{quantile:g}").set(rtts[min(int(quantile * len(rtts)), len(rtts) - 1)])


def _show_predictions(status: dict[str, Any]) -> None:
    for what in ("ttft", "tpot", "end_to_end"):
        key = f"{what}_s"
        pairs = [
            (each["predicted"][key], each["measured"][key])
            for each in status["finished"]
            if each["predicted"] and each["predicted"].get(key) and each["measured"].get(key)
        ]
        if pairs:
            PREDICTED.labels(what).set(median(predicted for predicted, _ in pairs))
            MEASURED.labels(what).set(median(measured for _, measured in pairs))
            PREDICTION_RATIO.labels(what).set(median(measured / predicted for predicted, measured in pairs))
    tokens_s = [each["measured"]["tpot_s"] for each in status["finished"] if each["measured"].get("tpot_s")]
    if tokens_s and status.get("bound_tpot_s"):
        BOUND_RATIO.set(status["bound_tpot_s"] / median(tokens_s))


def exposition() -> bytes:
    """All metrics in Prometheus' text format, for a process that has an HTTP server already."""
    text: bytes = generate_latest(REGISTRY)
    return text


def serve(port: int) -> None:
    """Answer http://127.0.0.1:`port`/metrics from a thread of its own. Raises OSError if the port is taken."""
    from prometheus_client import start_http_server

    start_http_server(port, addr="127.0.0.1", registry=REGISTRY)
