"""Emulated devices as people write them, and as files say."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals.bench.devices import describe_device, device_text, devices_of_cluster, read_device
from geopetals.errors import UnsupportedInput
from geopetals.swarm.emulation import DeviceSpec

CLUSTER = Path(__file__).parents[2] / "examples" / "clusters" / "home-gpus.yaml"
TIMES_S = st.floats(0, 3600, allow_nan=False)


def test_figures() -> None:
    spec = read_device("weights=2 ms, per_session=0.25ms,fixed=1ms,per_token=50 us,memory=4GB", dilation=2.0)
    assert spec == DeviceSpec(
        weights_s=0.002, session_s=0.00025, fixed_s=0.001, token_s=0.00005, memory_bytes=4 * 10**9, dilation=2.0
    )


@given(
    weights_s=st.floats(1e-6, 3600), session_s=TIMES_S, fixed_s=TIMES_S, token_s=TIMES_S, memory=st.integers(1, 10**14)
)
def test_a_device_survives_being_written(
    weights_s: float, session_s: float, fixed_s: float, token_s: float, memory: int
) -> None:
    spec = DeviceSpec(weights_s=weights_s, session_s=session_s, fixed_s=fixed_s, token_s=token_s, memory_bytes=memory)
    assert read_device(device_text(spec)) == spec
    assert DeviceSpec.from_dict(spec.to_dict()) == spec


def test_a_server_of_a_cluster() -> None:
    devices = devices_of_cluster(CLUSTER, dilation=3.0)
    spec = read_device(f"{CLUSTER}:paris", dilation=3.0)
    assert spec == devices["paris"]
    assert spec.memory_bytes == 22 * 10**9
    assert spec.decode_s(blocks=2, sessions=4) == pytest.approx(3 * 2 * (spec.weights_s + 4 * spec.session_s))


def test_the_operator_reads_the_times_of_the_clock() -> None:
    text = describe_device(DeviceSpec(weights_s=0.002, session_s=0.001, token_s=0.0001, dilation=10))
    assert "20 ms + 10 ms per session" in text
    assert "1 ms per token" in text
    assert "10 times" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no device"),
        ("weights", "no device"),
        (f"{CLUSTER}:atlantis", "atlantis"),
        ("nowhere.yaml:paris", "cannot be read"),
        ("weights=2", "unit"),
        ("weights=2ms,speed=3ms", "speed"),
        ("per_session=2ms", "weights is missing"),
        ("weights=0ms", "no time"),
        ("weights=2h", "unit"),
        ("weights=-1ms", "3600"),
        ("weights=1ms,memory=0B", "memory"),
    ],
)
def test_what_is_no_device_is_refused(text: str, said: str) -> None:
    with pytest.raises(UnsupportedInput, match=said):
        read_device(text)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"weights_s": "fast"},
        {"weights_s": None},
        {"weights_s": float("nan")},
        {"weights_s": 1, "dilation": 0},
        {"weights_s": 1, "memory_bytes": float("inf")},
        {"weights_s": 1, "colour": 2},
    ],
)
def test_figures_from_elsewhere_are_checked(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        DeviceSpec.from_dict(value)
