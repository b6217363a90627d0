"""The dashboard over a swarm that lives: its truth is the status', it follows a death and a plan, and it chats."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.live.commands import wait_for
from tests.live.coordinated import READY_S, CoordinatedSwarm, coordinated
from tests.web.page import CHROMIUM, browser_page

pytest.importorskip("playwright", reason="no playwright here: pip install playwright")
pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(400),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
]

PICTURES = os.environ.get("GEOPETALS_SCREENSHOTS")
"""A folder for the pictures of docs/dashboard.md; none are made without it."""
WAIT_MS = 60_000


@pytest.fixture
def swarm(llama: Path, tmp_path: Path) -> Iterator[CoordinatedSwarm]:
    """Three servers, each block on two of them, and a gateway that the page may ask."""
    with coordinated(llama, tmp_path) as started:
        for number in range(3):
            started.add_server("--memory", "900KB", "--max-blocks", "4", "--name", f"server-{number}")
        started.wait_status(lambda status: min(status["replicas"]) >= 1 and ready(status) == 3, "three servers")
        yield started


def ready(status: dict[str, Any]) -> int:
    return sum(server["state"] == "ready" for server in status["servers"])


def shown(page: Any) -> dict[str, tuple[str, str]]:
    """State and blocks of each server, as the page's table has them."""
    cells = "(row) => [...row.cells].map((cell) => cell.textContent)"
    rows = page.evaluate(f"[...document.querySelectorAll('#servers-table tbody tr')].map({cells})")
    return {row[0]: (row[2], row[3]) for row in rows}


def told(status: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {
        server["name"]: (server["state"], "\u2013" if server["span"] is None else "{}:{}".format(*server["span"]))
        for server in status["servers"]
    }


def picture(page: Any, name: str) -> None:
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"), full_page=True)


def say(page: Any, text: str, *, lines: int) -> str:
    """What the model answers; `lines` are in the log then."""
    page.fill("#chat-text", text)
    page.press("#chat-text", "Enter")

    def answer() -> str:
        log = page.locator("#chat-log p").all_inner_texts()
        over = page.is_hidden("#chat-stop") and len(log) == lines
        return str(log[-1]).removeprefix("Model: ") if over else ""

    found = wait_for(answer, timeout_s=60, what=lambda: str(page.locator("#chat-log p").all_inner_texts()))
    assert page.locator("#chat-log .bad").count() == 0, found
    return found


def test_the_page_tells_the_truth_follows_a_death_and_chats(swarm: CoordinatedSwarm) -> None:
    options = ["--join", swarm.tokens["client"], "--port", "0", "--cors-origin", swarm.url]
    gateway = swarm.run("api", *options, "--served-model-name", "tiny", "--default-max-tokens", "24")
    address = gateway.wait_line(r"(http://\S+)/v1", timeout_s=READY_S)[1]
    with browser_page() as (page, complaints):
        page.goto(swarm.url)
        page.wait_for_selector("body[data-ready=true]", timeout=WAIT_MS)
        page.click("#servers-table >> xpath=../summary")
        wait_for(lambda: shown(page) == told(swarm.status()), timeout_s=30, what=lambda: f"the truth in {shown(page)}")

        page.fill("#gateway", address)
        say(page, "Hello there", lines=2)
        say(page, "And again", lines=4)
        page.wait_for_selector("#tpot .dot", timeout=WAIT_MS)
        picture(page, "dashboard-light")

        swarm.run("replan", "--state", swarm.folder / "state", "--reason", "the page is looked at")
        wait_for(
            lambda: "the page is looked at" in page.inner_text("#events"),
            timeout_s=60,
            what=lambda: f"the plan among the events {page.inner_text('#events')}",
        )

        victim = next(each for each in swarm.commands if "server-0" in psutil.Process(each.pid).cmdline())
        os.kill(victim.pid, signal.SIGKILL)
        wait_for(
            lambda: shown(page).get("server-0", ("gone",))[0] == "gone",
            timeout_s=60,
            what=lambda: f"the death of server-0 in {shown(page)}",
        )
        wait_for(lambda: shown(page) == told(swarm.status()), timeout_s=60, what=lambda: f"the truth in {shown(page)}")
        assert page.inner_text("#events li:first-child strong") in json.dumps(swarm.status()["history"])
        assert [text for text in complaints if not re.search("50[03]", text)] == []


def test_dark_picture(swarm: CoordinatedSwarm) -> None:
    with browser_page(color_scheme="dark") as (page, complaints):
        page.goto(swarm.url)
        page.wait_for_selector("body[data-ready=true]", timeout=WAIT_MS)
        wait_for(lambda: "server-2" in page.inner_text("#blocks"), timeout_s=30, what="the map of blocks")
        picture(page, "dashboard-dark")
        assert complaints == []
