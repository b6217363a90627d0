"""How fast peers send, seen in passing."""

import asyncio

from hivemind.proto import runtime_pb2

from geopetals.swarm.rates import LARGE_BYTES, Rates
from geopetals.swarm.wire import frame, read_message
from tests.event_loop import in_loop


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_median_of_the_last_large_frames_that_were_waited_for() -> None:
    clock = Clock()
    rates = Rates(clock=clock)
    size = 2**17 + 1_000_000
    for took_s in (0.1, 0.2, 5.0):
        rates.note("a", size, waited_s=0.01, took_s=took_s)
    rates.note("a", size, waited_s=0.0, took_s=1e-9)
    rates.note("a", LARGE_BYTES - 1, waited_s=0.01, took_s=1e-9)
    rates.note("b", size, waited_s=0.01, took_s=1.0)
    assert dict(rates.samples()) == {"a": 5e6, "b": 1e6}
    clock.now = 500.0
    rates.note("b", size, waited_s=0.01, took_s=0.5)
    assert dict(rates.samples())["b"] == 1.5e6
    clock.now = 700.0
    assert dict(rates.samples()) == {"b": 2e6}


def test_no_more_is_kept_than_a_swarm_needs() -> None:
    rates = Rates()
    for number in range(1000):
        rates.note(f"peer{number}", LARGE_BYTES, waited_s=0.01, took_s=1.0)
    assert [peer for peer, _ in rates.samples()] == [f"peer{number}" for number in range(744, 1000)]


@in_loop
async def test_messages_are_measured_where_they_are_read() -> None:
    rates, reader = Rates(), asyncio.StreamReader()
    message = runtime_pb2.ExpertRequest(uid="x" * LARGE_BYTES)
    data = frame(message)
    reading = asyncio.create_task(read_message(reader, runtime_pb2.ExpertRequest, peer="a", rates=rates))
    await asyncio.sleep(0.01)
    reader.feed_data(data[:1000])
    await asyncio.sleep(0.01)
    reader.feed_data(data[1000:])
    assert await reading == message
    ((peer, bytes_per_s),) = rates.samples()
    assert peer == "a"
    assert 0 < bytes_per_s < LARGE_BYTES / 0.005
