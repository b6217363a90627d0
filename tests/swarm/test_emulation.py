"""An emulated device takes the time of its curve, by a clock that the test turns."""

import inspect
from contextlib import AbstractContextManager, suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geopetals.errors import UnsupportedInput
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.emulated_stage import emulate
from geopetals.swarm.emulation import DeviceSpec, EmulatedDevice, read_status
from geopetals.swarm.profile import measure
from geopetals.swarm.stage import Stage, load_stage
from tests.models import save_llama

SPEC = DeviceSpec(weights_s=0.004, session_s=0.001, fixed_s=0.002, token_s=0.0005)


class Machine:
    """A clock, and a sleep that comes back late."""

    def __init__(self, *, oversleeps_s: float = 0.0) -> None:
        self.now, self._oversleeps_s = 100.0, oversleeps_s

    def clock(self) -> float:
        self.now += 1e-7  # so that waiting awake ends
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + (self._oversleeps_s if seconds > 0 else 1e-6)

    def device(self, spec: DeviceSpec = SPEC) -> EmulatedDevice:
        return EmulatedDevice(spec, clock=self.clock, sleep=self.sleep)


def step_s(machine: Machine, device: EmulatedDevice, *, computes_s: float = 0.0, **what: int) -> float:
    began = machine.now
    with device.hold(**what):
        machine.now += computes_s
    return machine.now - began


@given(blocks=st.integers(1, 100), sessions=st.integers(1, 64), tokens=st.integers(1, 500), dilation=st.floats(0.1, 20))
def test_a_step_takes_the_curves_time(blocks: int, sessions: int, tokens: int, dilation: float) -> None:
    machine = Machine()
    device = machine.device(DeviceSpec(**{**SPEC.to_dict(), "dilation": dilation}))
    took_s = step_s(machine, device, blocks=blocks, sessions=sessions, tokens=tokens)
    decode_s = blocks * (0.004 + 0.001 * sessions)
    prefill_s = blocks * (0.002 + 0.0005 * sessions * tokens)
    assert took_s == pytest.approx(dilation * (decode_s if tokens == 1 else prefill_s), rel=1e-3, abs=1e-5)


def test_computing_within_that_time_is_free_and_beyond_it_is_not() -> None:
    machine = Machine()
    device = machine.device()
    assert step_s(machine, device, blocks=2, sessions=1, computes_s=0.009) == pytest.approx(0.010, abs=1e-5)
    assert device.overruns == 0
    assert step_s(machine, device, blocks=2, sessions=1, computes_s=0.015) == pytest.approx(0.015, abs=1e-5)
    assert device.overruns == 1


def test_late_wake_ups_do_not_add_up() -> None:
    machine = Machine(oversleeps_s=0.00075)
    device, began = machine.device(), machine.now
    for _ in range(100):
        step_s(machine, device, blocks=1, sessions=1)
    assert machine.now - began == pytest.approx(0.5, rel=0.005)
    assert device.lateness()["0.5"] == 100  # 0.75 ms, of which 0.3 ms would have been waited awake


def test_a_machine_that_is_very_late_does_not_make_the_next_step_fast() -> None:
    machine = Machine(oversleeps_s=0.1)
    device = machine.device()
    step_s(machine, device, blocks=1, sessions=1)
    began = machine.now
    with device.hold(blocks=1, sessions=1):
        machine.now += 0.001
    assert machine.now - began >= 0.0045


def test_lateness_of_a_step_long_ago_is_forgotten() -> None:
    machine = Machine(oversleeps_s=0.002)
    device = machine.device()
    step_s(machine, device, blocks=1, sessions=1)
    machine.now += 1.0
    assert step_s(machine, device, blocks=1, sessions=1) >= 0.005


def test_a_step_that_fails_does_not_wait() -> None:
    machine = Machine()
    device, began = machine.device(), machine.now
    with suppress(RuntimeError), device.hold(blocks=100, sessions=1):
        raise RuntimeError
    assert machine.now - began < 0.001
    assert device.steps == 0


def test_the_status_says_that_and_what_is_emulated() -> None:
    machine = Machine()
    device = machine.device()
    step_s(machine, device, blocks=3, sessions=1)
    status = device.status()
    assert status["weights_s"] == 0.004
    assert status["steps"] == 1
    assert status["busy_s"] == pytest.approx(0.015)


@pytest.mark.parametrize(
    "change",
    [
        {"late_ms": None},
        {"late_ms": {"1": 5}},
        {"steps": "many"},
        {"steps": None},
        {"weights_s": -1},
        {"dilation": {}},
        {"more": 1},
    ],
)
def test_a_status_from_a_stranger_is_checked(change: dict[str, object]) -> None:
    status = Machine().device().status()
    assert read_status(status) == status
    assert read_status({**status, **change}) is None


@pytest.mark.parametrize("value", [None, 3, [], {}, "fast"])
def test_what_is_no_status_is_none(value: object) -> None:
    assert read_status(value) is None


class CountingDevice(EmulatedDevice):
    """Notes what held it."""

    def __init__(self) -> None:
        self.held: list[dict[str, int]] = []
        super().__init__(DeviceSpec(weights_s=1e-6))

    def hold(self, *, blocks: int, sessions: int, tokens: int = 1) -> AbstractContextManager[None]:
        self.held.append({"blocks": blocks, "sessions": sessions, "tokens": tokens})
        return super().hold(blocks=blocks, sessions=sessions, tokens=tokens)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    directory = save_llama(tmp_path_factory.mktemp("emulation"), layers=2)
    return load_stage(Checkpoint.open(str(directory)), 0, 2, dtype=torch.float32, device=torch.device("cpu"))


def test_all_that_a_stage_computes_holds_its_device_and_is_computed_as_before(stage: Stage) -> None:
    device = CountingDevice()
    emulated = emulate(stage, device)
    hidden = torch.randn(2, 3, emulated.hidden_size)
    assert torch.equal(emulated.run(hidden, 0, 2), stage.run(hidden, 0, 2))
    kv = emulated.allocate_kv(0, 2, batch=2, max_length=8)
    emulated.run(hidden, 0, 2, kv=kv)
    emulated.run(hidden[:, :1], 0, 1, kv=kv)
    assert kv.length == 4
    prefill = {"blocks": 2, "sessions": 2, "tokens": 3}
    assert device.held == [prefill, prefill, {"blocks": 1, "sessions": 2, "tokens": 1}]


@pytest.mark.parametrize("together", [True, False])
def test_sessions_that_are_computed_together_hold_the_device_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    assert stage.batches
    if not together:
        monkeypatch.setattr(stage.batching, "layout", None)
    device = CountingDevice()
    emulated = emulate(stage, device)
    sessions = [stage.allocate_kv(0, 2, batch=batch, max_length=8) for batch in (1, 2)]
    hidden = torch.randn(3, 1, stage.hidden_size)
    expected = torch.cat([stage.run(part, 0, 2) for part in hidden.split([1, 2])])
    assert torch.allclose(emulated.decode(hidden, 0, 2, sessions), expected, atol=1e-5)
    assert [kv.length for kv in sessions] == [1, 1]
    rows = [3] if together else [1, 2]
    assert device.held == [{"blocks": 2, "sessions": count, "tokens": 1} for count in rows]


def test_nothing_is_computed_past_the_device(stage: Stage) -> None:
    methods = {name: member for name, member in vars(Stage).items() if inspect.isfunction(member) and name[0] != "_"}
    computing = {name for name, method in methods.items() if "hidden" in inspect.signature(method).parameters}
    assert "run" in computing
    assert computing <= vars(type(emulate(stage, CountingDevice()))).keys()


def test_the_profiler_sees_the_device(stage: Stage) -> None:
    device = EmulatedDevice(DeviceSpec(weights_s=0.004, token_s=0.001))
    speed = measure(emulate(stage, device))
    assert device.steps > 2
    assert speed.inference_rps <= 1.05 / 0.004
    assert speed.forward_rps <= 1.05 / 0.001


def test_what_a_stage_refuses_takes_no_time(stage: Stage) -> None:
    device = CountingDevice()
    with pytest.raises(UnsupportedInput):
        emulate(stage, device).run(torch.zeros(1, 1, 3), 0, 2)
    assert device.steps == 0
