"""A coordinator's status made up from a seed, of any size, with hostile names in it."""

import random
from itertools import pairwise
from typing import Any

HOSTILE = '<img src=x onerror="document.title=1">'


def status(*, servers: int = 4, blocks: int = 24, sessions: int = 3, waiting: int = 2, seed: int = 0) -> dict[str, Any]:
    """As GET /status answers it."""
    chance = random.Random(seed)
    peers = [f"12D3KooWserver{number:04d}" for number in range(servers)]
    per = max(1, -(-blocks // max(1, servers // 2 or 1)))
    listed = [_server(peer, number, per, blocks, chance) for number, peer in enumerate(peers)]
    replicas = [
        sum(each["span"][0] <= block < each["span"][1] for each in listed if each["span"]) for block in range(blocks)
    ]
    links = [[a, b, chance.uniform(0.005, 0.2), chance.random() < 0.1] for a, b in pairwise(peers)]
    return {
        "coordinator": {
            "release": "1",
            "peer": "12D3KooWcoordinator",
            "swarm": "a-swarm",
            "model": "a-model",
            "blocks": blocks,
            "open": False,
            "now": 1000.0,
            "up_s": 77.0,
            "events": 5,
            "trust_version": 1,
            "connected": {"server": servers, "client": 1, "admin": 0, "relay": 0},
        },
        "covered": all(replicas),
        "replicas": replicas,
        "servers": listed,
        "clients": 1,
        "links": {"measured": links, "estimated": 3, "estimate_error_s": 0.01},
        "sessions": [_session(number, peers, blocks) for number in range(sessions)],
        "queue": [
            {**_session(number + 100, peers, blocks), "position": number, "start_s": 4.0} for number in range(waiting)
        ],
        "running": sessions,
        "waiting": waiting,
        "counts": {},
        "demand": {"arrivals_per_s": 0.1, "prompt_tokens": 128, "output_tokens": 128},
        "plan": {},
        "plan_due": None,
        "history": [
            {
                "number": 1,
                "at_s": 900.0,
                "what": "server joined",
                "why": f"{HOSTILE} takes 0:6",
                "predicted": "{}",
                "replaced": "{}",
            },
            {
                "number": 2,
                "at_s": 950.0,
                "what": "plan adopted",
                "why": "it is faster",
                "predicted": '{"gain_s": 12.5}',
                "replaced": "{}",
            },
        ],
        "finished": [_finished(number, chance) for number in range(20)],
        "accuracy": {"sessions": 20, "ttft_s": 1.1, "tpot_s": 1.02, "end_to_end_s": 1.05, "start_error_s": 0.2},
    }


def _server(peer: str, number: int, per: int, blocks: int, chance: random.Random) -> dict[str, Any]:
    start = min(number * per % max(1, blocks), blocks - 1)
    span = [start, min(blocks, start + per)]
    return {
        "peer": peer,
        "name": HOSTILE if number == 1 else f"server {number}",
        "device": "cpu",
        "dtype": "float32",
        "quantization": None,
        "relayed": number % 7 == 3,
        "state": "ready",
        "span": span,
        "assigned": span,
        "target": span,
        "epoch": 1,
        "away_s": None,
        "failures": 0,
        "reserved_block_tokens": 100,
        "cache": {"total": 1000, "free": chance.randrange(1000), "running": 1, "waiting": 0},
        "foreign_block_tokens": 0,
        "sessions": 1,
        "load_s": 2.0,
    }


def _session(number: int, peers: list[str], blocks: int) -> dict[str, Any]:
    middle = blocks // 2
    return {
        "session_id": f"session{number:06d}",
        "client": "12D3KooWclient00",
        "batch": 1,
        "max_length": 256,
        "tokens_used": 40,
        "chain": [[peers[0], 0, middle], [peers[-1], middle, blocks]],
        "asked_s": -3.0,
        "start_s": -2.0,
        "end_s": 9.0,
        "predicted": {"ttft_s": 0.3, "tpot_s": 0.05, "end_to_end_s": 10.0, "wait_s": 0.0},
    }


def _finished(number: int, chance: random.Random) -> dict[str, Any]:
    tpot_s = chance.uniform(0.03, 0.09)
    return {
        "session_id": f"old{number}",
        "client": "12D3KooWclient00",
        "asked_s": 10.0 * number,
        "started_s": 10.0 * number,
        "ended_s": 10.0 * number + 8,
        "first_predicted_start_s": None,
        "last_predicted_start_s": None,
        "predicted": {"ttft_s": 0.3, "tpot_s": 0.05, "end_to_end_s": 10.0, "wait_s": 0.0},
        "measured": {
            "ttft_s": 0.4,
            "tpot_s": tpot_s,
            "tokens": 100,
            "wait_s": 0.0,
            "end_to_end_s": 8.0,
            "failovers": 0,
        },
    }
