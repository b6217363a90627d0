from pathlib import Path
from typing import Any

import pytest
import torch

from geopetals.coordinator.messages import DecodeSample, PrefillSample, Profile
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.emulated_stage import emulate
from geopetals.swarm.emulation import DeviceSpec, EmulatedDevice
from geopetals.swarm.profile_store import Subject, find_profile, keep_profile
from geopetals.swarm.profiling import measure_curve, representative_span
from geopetals.swarm.self_measurement import throughput_of
from geopetals.swarm.stage import Stage, load_stage
from tests.models import save_llama

SPEC = DeviceSpec(weights_s=0.02, session_s=0.002, fixed_s=0.01, token_s=0.001)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    checkpoint = Checkpoint.open(str(save_llama(tmp_path_factory.mktemp("profiling"), layers=4)))
    return load_stage(checkpoint, *representative_span(4), dtype=torch.float32, device=torch.device("cpu"))


class VirtualTime:
    """In which nothing takes time but to sleep."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1e-6)


def measure_emulated(stage: Stage, spec: DeviceSpec, *, budget_s: float) -> tuple[Any, float]:
    time = VirtualTime()
    device = EmulatedDevice(spec, clock=time.clock, sleep=time.sleep)
    return measure_curve(emulate(stage, device), budget_s=budget_s, clock=time.clock), time.now


def test_an_emulated_device_is_measured_as_it_was_described(stage: Stage) -> None:
    curve, took_s = measure_emulated(stage, SPEC, budget_s=8.0)
    for sample in curve.decode:
        expected_s = SPEC.decode_s(blocks=1, sessions=sample.batch)
        assert sample.seconds_per_block == pytest.approx(expected_s, rel=0.01), sample
    for sample in curve.prefill:
        assert sample.seconds_per_block == pytest.approx(SPEC.prefill_s(blocks=1, tokens=sample.tokens), rel=0.01)
    assert {1, 8, 16} <= {sample.batch for sample in curve.decode}
    assert len(curve.prefill) > 1
    assert curve.pass_s == pytest.approx(0.0, abs=1e-3)
    assert took_s < 9.0


def test_a_slow_device_gives_few_points_rather_than_to_take_long(stage: Stage) -> None:
    slow = DeviceSpec(weights_s=1.0, session_s=0.1, fixed_s=2.0, token_s=0.1)
    curve, took_s = measure_emulated(stage, slow, budget_s=4.0)
    assert [sample.batch for sample in curve.decode] == [1]
    assert len(curve.prefill) == 1
    assert took_s < 40


def test_what_is_measured_leaves_no_cache_behind(stage: Stage) -> None:
    before = torch.get_num_threads()
    curve = measure_curve(stage, budget_s=0.2)
    assert all(sample.seconds_per_block > 0 for sample in (*curve.decode, *curve.prefill))
    assert torch.get_num_threads() == before


def test_blocks_in_the_middle_stand_for_all() -> None:
    assert representative_span(1) == (0, 1)
    assert representative_span(2) == (0, 2)
    assert representative_span(30) == (14, 16)


def test_petals_speed_is_told_of_the_first_and_the_longest() -> None:
    speed = throughput_of(profile())
    assert (speed.inference_rps, speed.forward_rps) == (pytest.approx(100), pytest.approx(1280))


def profile() -> Profile:
    return Profile(
        device="CPU",
        dtype="float32",
        quantization=None,
        block_bytes=100,
        kv_bytes_per_token=8,
        memory_bytes=1000,
        decode=(DecodeSample(1, 128, 0.01), DecodeSample(8, 128, 0.02)),
        prefill=(PrefillSample(32, 0.05), PrefillSample(128, 0.1)),
        overhead_s=0.001,
        load_bytes_s=1e8,
        measured_at=1.0,
    )


def test_a_profile_is_found_again_for_the_same_device_and_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEOPETALS_CACHE", str(tmp_path))
    identity = Checkpoint.open(str(save_llama(tmp_path / "model", layers=1))).identity()
    fields: dict[str, Any] = {
        "device": "CPU", "threads": 1, "identity": identity, "dtype": "float32", "quantization": None
    }  # fmt: skip
    ours = Subject(**fields, emulated=None)
    assert find_profile(ours) is None
    keep_profile(ours, profile())
    assert find_profile(ours) == profile()
    for change in ({"device": "GPU"}, {"threads": 2}, {"dtype": "bfloat16"}, {"quantization": "int8"}):
        assert find_profile(Subject(**{**fields, **change}, emulated=None)) is None
    assert find_profile(Subject(**fields, emulated=SPEC.to_dict())) is None


def test_a_damaged_profile_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOPETALS_CACHE", str(tmp_path))
    identity = Checkpoint.open(str(save_llama(tmp_path / "model", layers=1))).identity()
    ours = Subject(device="CPU", threads=1, identity=identity, dtype="float32", quantization=None, emulated=None)
    keep_profile(ours, profile())
    (file,) = (tmp_path / "profiles").iterdir()
    for text in ("", "{", "[]", "{}", '{"decode": 1}', "\xff"):
        file.write_text(text, encoding="latin-1")
        assert find_profile(ours) is None
