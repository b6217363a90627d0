"""Noise breaks nothing."""

import asyncio
import random
from collections.abc import Iterator

import pytest

from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import (
    frame,
)
from tests.swarm.handler_rig import DEADLINE_S, HIDDEN, Client, Server, first, play, randn


def noise(random_: random.Random, client: Client) -> Iterator[bytes]:
    """Messages of growing plausibility."""
    yield random_.randbytes(random_.randrange(1, 60))
    yield bytes([random_.randrange(2)]) + random_.randrange(40).to_bytes(8, "big") + random_.randbytes(40)
    request = first(client, randn(1, 2))
    good = bytearray(frame(request))
    for _ in range(random_.randrange(1, 6)):
        good[random_.randrange(9, len(good))] = random_.randrange(256)
    yield bytes(good)
    request.metadata = random_.randbytes(random_.randrange(30))
    yield frame(request)
    values = [None, True, -1, 2**40, 1.5, "", "text", b"\xff", [], {}, [1, [2]], {"a": {}}, float("nan")]
    keys = ["max_length", "session_id", "step_id", "args_structure", "alloc_timeout", "next_servers"]
    chosen = {key: random_.choice(values) for key in random_.sample(keys, random_.randrange(1, 4))}
    yield frame(first(client, randn(1, 2), **chosen))
    mixed = first(client, randn(1, 2))
    for tensor in mixed.tensors:
        if random_.random() < 0.5:
            tensor.size[:] = [random_.choice([0, 1, 2, HIDDEN, 2**32 - 1]) for _ in range(random_.randrange(5))]
        if random_.random() < 0.3:
            tensor.dtype = random_.choice(["object", "int64", "bfloat16", "", "float16"])
    yield frame(mixed)


@pytest.mark.parametrize("seed", range(25))
def test_no_noise_breaks_the_server(stage: Stage, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Server) -> None:
        random_ = random.Random(seed)
        for opened in (False, True):
            for number in range(6):
                client = await server.connect(session_id=f"{opened} {number}")
                if opened:
                    await client.begin(8)
                client.writer.write(list(noise(random_, client))[number])
                client.writer.write_eof()
                async with asyncio.timeout(DEADLINE_S):
                    await client.reader.read()
                client.writer.close()
        await server.serves_honestly()

    play(stage, scenario)
    assert "Traceback" not in caplog.text
