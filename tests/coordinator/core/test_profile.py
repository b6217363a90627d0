"""From measurements to the lines that the planner wants."""

from dataclasses import replace

import pytest

from geopetals.coordinator.core.profile import decode_time, prefill_time, server_spec
from geopetals.coordinator.messages import DecodeSample, Limits, PrefillSample, Span
from tests.coordinator.core.virtual_swarm import MODEL, registration

PROFILE = registration().profile


def test_a_line_is_found_again() -> None:
    samples = tuple(DecodeSample(batch, 128, 0.003 + 0.0005 * batch) for batch in (1, 2, 4, 8))
    time = decode_time(replace(PROFILE, decode=samples))
    assert time.weights_s == pytest.approx(0.003)
    assert time.session_s == pytest.approx(0.0005)
    prefill = prefill_time(replace(PROFILE, prefill=(PrefillSample(16, 0.01), PrefillSample(116, 0.11))))
    assert prefill.for_tokens(66) == pytest.approx(0.06)


def test_noise_gives_no_negative_times() -> None:
    falling = (DecodeSample(1, 128, 0.004), DecodeSample(8, 128, 0.003))
    assert decode_time(replace(PROFILE, decode=falling)).session_s == 0
    steep = (PrefillSample(10, 0.001), PrefillSample(20, 0.004))
    time = prefill_time(replace(PROFILE, prefill=steep))
    assert time.fixed_s >= 0
    assert time.for_tokens(15) == pytest.approx(0.0025, rel=0.01)


def test_limits_of_the_operator_and_larger_blocks_count() -> None:
    spec = server_spec("s", PROFILE, Limits(pin=Span(1, 3), max_blocks=5, memory_bytes=9_000_000), MODEL)
    assert spec.memory_bytes == 9_000_000
    assert spec.max_blocks == 5
    assert spec.blocks == (1, 3)
    larger = replace(PROFILE, block_bytes=2 * MODEL.block_bytes)
    assert server_spec("s", larger, Limits(memory_bytes=9_000_000), MODEL).max_blocks == 4
