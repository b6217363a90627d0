"""When a step is tried again, and when it is given up."""

import asyncio
from collections.abc import Callable

import pytest

from geopetals.client import retry as retry_module
from geopetals.client.config import ClientConfig
from geopetals.client.retry import Retry
from geopetals.errors import NoChain, ServerFull, ServerGone, SwarmFailure

CONFIG = ClientConfig(max_retries=2, recovery_timeout=60.0, full_timeout=60.0)


class FakeTime:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(retry_module, "time", fake)
    monkeypatch.setattr(retry_module, "asyncio", fake)
    return fake


def fail(retry: Retry, error: SwarmFailure) -> None:
    asyncio.run(retry.after(error, in_session=True))


def until_raised(retry: Retry, make: Callable[[], SwarmFailure]) -> None:
    while True:
        try:
            fail(retry, make())
        except SwarmFailure:
            return


@pytest.mark.parametrize("kind", [NoChain, ServerFull])
def test_waiting_counts_from_the_first_failure(clock: FakeTime, kind: type[SwarmFailure]) -> None:
    """Not from the start of the step, which may have computed a long prompt before."""
    retry = Retry(CONFIG)
    clock.now_s = 70.0
    until_raised(retry, lambda: kind("nobody can help."))
    assert 70.0 + 60.0 <= clock.now_s <= 70.0 + 75.0


def test_a_failure_in_between_starts_the_clock_anew(clock: FakeTime) -> None:
    retry = Retry(CONFIG)
    fail(retry, NoChain("nobody serves it."))
    clock.now_s += 70.0  # a chain was opened and worked for that long
    fail(retry, ServerGone("it died."))
    began_s = clock.now_s
    until_raised(retry, lambda: NoChain("nobody serves it."))
    assert began_s + 60.0 <= clock.now_s <= began_s + 65.0


def test_waiting_uses_no_retry_up(clock: FakeTime) -> None:
    retry = Retry(CONFIG)
    for _ in range(5):
        fail(retry, NoChain("nobody serves it."))
    for _ in range(CONFIG.max_retries):
        fail(retry, ServerGone("it died."))
    with pytest.raises(ServerGone):
        fail(retry, ServerGone("it died."))


def test_it_ends_whatever_comes_in_turn(clock: FakeTime) -> None:
    retry, kinds = Retry(CONFIG), [ServerFull, ServerGone]
    until_raised(retry, lambda: kinds[retry.attempts % 2]("as it happens."))
    assert retry.attempts <= 2 * CONFIG.max_retries + 2
