"""The dashboard in a real headless browser: it tells the truth, harmlessly, to everybody."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.live.commands import wait_for
from tests.web.page import CHROMIUM, FakeCoordinator, browser_page
from tests.web.synthetic import HOSTILE, status

playwright = pytest.importorskip("playwright", reason="no playwright here: pip install playwright")
pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
]

WAIT_MS = 30_000


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    with FakeCoordinator(status()).running() as running:
        yield running


def opened(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("body[data-ready=true]", timeout=WAIT_MS)


def test_the_page_shows_the_status_and_follows_it(coordinator: FakeCoordinator) -> None:
    with browser_page() as (page, complaints):
        opened(page, coordinator.url)
        assert "all blocks are served" in page.inner_text("#summary")
        assert "4 of 4 servers ready" in page.inner_text("#summary")
        assert page.locator("#servers-table tbody tr").count() == 4
        assert page.locator("#sessions tbody tr").count() == 3
        assert page.locator("#queue tbody tr").count() == 2
        assert page.locator("#events li").count() == 2
        assert page.locator("#tpot .dot").count() == 20
        died = status()
        died["servers"][0] |= {"state": "gone", "span": None}
        died["replicas"][0] = 0
        died["history"].append(
            {"number": 3, "at_s": 999.0, "what": "server lost", "why": "it is silent", "predicted": "{}"}
        )
        coordinator.status = died
        page.wait_for_selector("#summary .bad", timeout=WAIT_MS)
        assert "1 blocks have no server" in page.inner_text("#summary")
        assert "server lost" in page.inner_text("#events li:first-child")
        assert complaints == []


def test_hostile_names_are_text(coordinator: FakeCoordinator) -> None:
    with browser_page() as (page, complaints):
        opened(page, coordinator.url)
        assert page.locator("main img").count() == 0
        assert HOSTILE in page.inner_text("#events")
        assert page.title() == "GeoPETALS"
        assert complaints == []


def test_it_asks_for_the_token_and_keeps_it_to_itself() -> None:
    with FakeCoordinator(status(), token="right").running() as coordinator, browser_page() as (page, complaints):
        page.goto(coordinator.url)
        page.fill("#token", "wrong")
        page.press("#token", "Enter")
        wait_for(lambda: "token" in page.inner_text("#summary"), timeout_s=30, what="token")
        page.fill("#token", "right")
        page.press("#token", "Enter")
        page.wait_for_selector("body[data-ready=true]", timeout=WAIT_MS)
        assert page.is_hidden("#login")
        assert page.evaluate("localStorage.length") == 0
        assert [text for text in complaints if "401" not in text] == []


def test_the_keyboard_reaches_everything(coordinator: FakeCoordinator) -> None:
    with browser_page() as (page, _):
        opened(page, coordinator.url)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        seen = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            seen.add(page.evaluate("document.activeElement.id"))
        assert {
            "theme",
            "blocks",
            "sessions",
            "queue",
            "events",
            "gateway",
            "key",
            "chat-text",
            "chat-send",
            "copy",
        } <= seen


def test_every_picture_has_words_and_every_field_a_label(coordinator: FakeCoordinator) -> None:
    with browser_page() as (page, _):
        opened(page, coordinator.url)
        assert page.locator("svg[role=img]:not([aria-label])").count() == 0
        assert page.evaluate("[...document.querySelectorAll('input')].every((field) => field.labels.length > 0)")
        assert page.evaluate(
            "[...document.querySelectorAll('main > section')].every((part) => part.hasAttribute('aria-labelledby'))"
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground_in_both_themes(coordinator: FakeCoordinator, scheme: str) -> None:
    with browser_page(color_scheme=scheme) as (page, _):
        opened(page, coordinator.url)
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        for selector in ("#summary", ".hint", "h2", "td"):
            assert contrast(page, selector) >= 4.5, selector
        page.click("#theme")
        assert page.evaluate("document.documentElement.dataset.theme") != scheme


def test_two_hundred_servers_are_drawn_and_updated_without_a_stall() -> None:
    large = status(servers=200, blocks=126, sessions=300, waiting=200)
    with FakeCoordinator(large).running() as coordinator, browser_page() as (page, complaints):
        opened(page, coordinator.url)
        assert page.locator("#servers-table tbody tr").count() == 200
        assert "the first 100 of 300" in page.inner_text("#sessions")
        assert page.evaluate("document.querySelectorAll('*').length") < 12_000
        coordinator.status = {
            **large,
            "servers": [{**server, "state": "gone", "span": None} for server in large["servers"]],
        }
        wait_for(lambda: "0 of 200" in page.inner_text("#summary"), timeout_s=30, what="0 of 200")
        assert complaints == []


def test_what_is_old_is_called_old() -> None:
    with browser_page() as (page, _):
        with FakeCoordinator(status()).running() as coordinator:
            opened(page, coordinator.url)
        wait_for(lambda: "is old" in page.inner_text("#summary"), timeout_s=30, what="is old")


def contrast(page: Any, selector: str) -> float:
    """WCAG's contrast ratio of an element's text and the ground behind it."""

    def luminance(colour: str) -> float:
        parts = [int(float(part)) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    text, ground = page.evaluate(
        """(selector) => {
            const element = document.querySelector(selector);
            let behind = element;
            while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
            return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        }""",
        selector,
    )
    light, dark = sorted((luminance(text), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
