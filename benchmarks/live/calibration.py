"""What software takes, measured before the scenario on a network of its own: a profile like those of the devices.

Three servers in a chain, all machines equally far from each other: first not at all, then by 100 ms. With s a pass'
computing on the emulated devices and h hops,

    hop_s      (time per token - s) / h, without delays
    open_s     time to first token - prompt's computing - h hop_s, without delays
    open_rtts  what the delays add to the time to first token beyond the prompt's own way, in round trips

Medians of some sessions, one at a time.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from geopetals.bench.run import RunRecord
from geopetals.cluster import ClientId, DecodeTime, Network, PlaceId, PrefillTime, RttMatrix, ServerId
from geopetals.wan import HostSpec, LinkSpec, Wan, WanSpec
from live import requests
from live.fixed import FixedSwarm
from live.prediction import Software
from live.scenario import LiveScenario
from live.stage import Stage
from live.stock import StockSwarm
from live.translation import Live
from tests.live.forked import Forks

_NAMES = ("c1", "c2", "c3")
_CLIENT = "asking"
_FAR_S = 0.1
_DECODE_S, _PREFILL_S = 0.003, 0.006
_SESSIONS = 3
OWN, STOCK = "own", "stock"


def calibrate(which: str, live: Live, model: Path, forks: Forks, folder: Path) -> tuple[Software, list[dict[str, Any]]]:
    """Of our data plane or of stock PETALS', with the scenario's model and dilation; and the runs it is from."""
    chain = Live(_scenario(live))
    blocks = live.model.num_blocks
    cuts = [round(number * blocks / len(_NAMES)) for number in range(len(_NAMES) + 1)]
    spans = {name: (cuts[number], cuts[number + 1]) for number, name in enumerate(_NAMES)}
    hosts = tuple(HostSpec(name=name) for name in (_CLIENT, *_NAMES))
    names = [host.name for host in hosts]
    links = {(a, b): LinkSpec(rtt_s=0.0) for a in names for b in names if a != b}
    spec = WanSpec(hosts=hosts, links=links, dilation=live.scenario.dilation)
    with Wan(spec) as wan:
        stage = Stage(live=chain, wan=wan, forks=forks, model=model, folder=folder)
        swarm = StockSwarm(stage, spans) if which == STOCK else FixedSwarm(stage, spans, lambda _: 4096)
        try:
            swarm.start(list(_NAMES))
            near = _run(swarm, stage)
            wan.set("all", rtt_s=_FAR_S)
            far = _run(swarm, stage)
        finally:
            swarm.stop()
    return _software(which, blocks, near, far), [near, far]


def _software(which: str, blocks: int, near: dict[str, Any], far: dict[str, Any]) -> Software:
    hops = len(_NAMES)
    hop_s = max((near["tpot_s"] - blocks * _DECODE_S) / hops, 0.0)
    open_s = max(near["ttft_s"] - blocks * _PREFILL_S - hops * hop_s, 0.0)
    way_s = _FAR_S * (hops if which == STOCK else (hops + 1) / 2)
    added_s = far["ttft_s"] - near["ttft_s"] - way_s
    return Software(hop_s=hop_s, open_s=open_s, open_rtts=max(added_s / _FAR_S / (hops if which == STOCK else 1), 0.0))


def _run(swarm: StockSwarm | FixedSwarm, stage: Stage) -> dict[str, Any]:
    scenario = stage.live.scenario
    load = requests.load_of(scenario, scenario.cluster, requests.ONE, 1.0)
    record = requests.run(
        [swarm.worker(_CLIENT)],
        requests.drawn(scenario, load, order=0),
        closed=True,
        dilation=scenario.dilation,
        before=lambda: None,
        after=lambda: None,
    )
    return _medians(record, scenario.dilation)


def _medians(record: RunRecord, dilation: float) -> dict[str, Any]:
    done = [outcome for outcome in record.outcomes if outcome.failure is None]
    steps = max(len(done[0].token_s) - 1, 1)
    return {
        "ttft_s": statistics.median(each.token_s[0] for each in done) / dilation,
        "tpot_s": statistics.median((each.token_s[-1] - each.token_s[0]) / steps for each in done) / dilation,
        "sessions": len(done),
        "hops": [len(each.chain) for each in done],
    }


def _scenario(live: Live) -> LiveScenario:
    """The same model and sessions, three fast servers with memory for all."""
    given = live.scenario
    server = given.cluster.servers[0]
    servers = tuple(
        replace(
            server,
            id=ServerId(name),
            memory_bytes=int(2 * live.large.num_blocks * (live.large.block_bytes + live.large.kv_bytes)),
            gpu=None,
            decode_block=DecodeTime(weights_s=_DECODE_S / given.merge),
            prefill_block=PrefillTime(fixed_s=_PREFILL_S / given.merge),
            max_blocks=None,
            blocks=None,
            place=None,
            relayed=False,
        )
        for name in _NAMES
    )
    client = replace(given.cluster.clients[0], id=ClientId(_CLIENT), place=None)
    names = (_CLIENT, *_NAMES)
    rtts = RttMatrix(rtts=tuple((PlaceId(a), PlaceId(b), 0.0) for a in names for b in names if a != b))
    cluster = replace(given.cluster, servers=servers, clients=(client,), network=Network(rtt=rtts))
    return replace(given, cluster=cluster, sessions={requests.ONE: _SESSIONS}, events=(), coordinator=_NAMES[0])
