"""Large answers to admins."""

import random

import msgpack
import pytest

from geopetals.coordinator.packed import pack_answer, unpack_answer


def test_the_links_of_many_servers_fit_into_a_frame_and_come_out_as_they_were() -> None:
    chance = random.Random(0)
    rtts = [[round(chance.uniform(0.001, 0.3), 6) for _ in range(300)] for _ in range(300)]
    answer = {"cluster": {"links": rtts}, "plan": None}
    packed = pack_answer(answer)
    assert len(msgpack.packb(packed)) < 2**20
    assert unpack_answer(packed) == answer


def test_small_answers_stay_readable() -> None:
    assert pack_answer({"asked": True}) == unpack_answer({"asked": True}) == {"asked": True}


@pytest.mark.parametrize("data", [b"", b"no zlib", b"x\x9c", b"x\x9cc\x00\x00\x00\x01\x00\x01"])
def test_what_cannot_be_read_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        unpack_answer({"zlib": data})
