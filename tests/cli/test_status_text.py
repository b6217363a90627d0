"""`geopetals status` shows what servers call themselves, and obeys none of it."""

import io

from rich.console import Console
from rich.table import Table

from geopetals.cli.status import plain, render

HOSTILE = "[/bold] [link=http://x]\x1b[2J\x07\u202e\r\nname[/]"
SHOWN = "[/bold] [link=http://x][2Jname[/]"


def shown(what: object) -> str:
    file = io.StringIO()
    Console(file=file, width=400, force_terminal=True, color_system=None).print(what)
    return file.getvalue()


def test_text_from_outside_is_neither_markup_nor_control() -> None:
    assert shown(plain(HOSTILE)) == SHOWN + "\n"
    table = Table(box=None)
    table.add_row(plain(HOSTILE))
    assert SHOWN in shown(table)


def test_hostile_names_everywhere() -> None:
    server = {
        "name": HOSTILE, "peer": "p" * 8, "device": HOSTILE, "dtype": HOSTILE, "quantization": None, "span": [0, 2],
        "target": [0, 2], "state": HOSTILE, "sessions": 1, "cache": None, "reserved_block_tokens": 0,
        "foreign_block_tokens": 0, "relayed": False,
    }  # fmt: skip
    session = {
        "session_id": HOSTILE, "client": HOSTILE, "chain": [["p" * 8, 0, 2]], "tokens_used": 1, "max_length": 2,
        "predicted": None, "end_s": 1.0,
    }  # fmt: skip
    text = shown(
        render(
            {
                "coordinator": {"swarm": HOSTILE, "model": HOSTILE, "blocks": 2, "open": False,
                                "connected": {"server": 1, "client": 1}},
                "replicas": [1, 1], "servers": [server], "links": {"measured": []}, "sessions": [session],
                "queue": [{"session_id": HOSTILE, "client": HOSTILE, "position": 0, "start_s": 1.0}],
                "counts": {"closed": 0, "refused": 0}, "running": 1, "waiting": 1,
                "demand": {"arrivals_per_s": 0.1, "prompt_tokens": 1, "output_tokens": 1},
                "accuracy": {"sessions": 0}, "plan": {"number": 1, "adopted": True, "why": HOSTILE},
                "plan_due": HOSTILE,
            }
        )
    )  # fmt: skip
    assert SHOWN in text
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
