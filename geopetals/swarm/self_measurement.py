"""The profile that a server shows to its coordinator: found among those of earlier starts, or measured."""

import time
from dataclasses import replace

import torch

from geopetals.coordinator.messages import Profile
from geopetals.swarm.compute import Priority
from geopetals.swarm.emulated_stage import emulate
from geopetals.swarm.emulation import EmulatedDevice
from geopetals.swarm.holding import Loader
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.profile import Throughput
from geopetals.swarm.profile_store import Subject, describe_hardware, find_profile, keep_profile
from geopetals.swarm.profiling import HOP_SOFTWARE_S, measure_curve, representative_span


async def find_or_measure(loader: Loader, identity: ModelIdentity, *, anew: bool = False) -> Profile:
    """Raises CheckpointError and MemoryShortage if not even the blocks to measure can be loaded."""
    subject = Subject(
        device=describe_hardware(loader.device),
        threads=torch.get_num_threads(),
        identity=identity,
        dtype=_name(loader.dtype),
        quantization=loader.quantization,
        emulated=loader.emulated.spec.to_dict() if loader.emulated is not None else None,
    )
    found = None if anew else find_profile(subject)
    if found is None:
        loader.reporter.line("measuring how fast this machine is")
        found = await loader.compute.run(lambda: _measure(loader, subject.device), Priority.BATCH)
        keep_profile(subject, found)
    return replace(found, memory_bytes=loader.memory_bytes)  # what may be used differs from start to start


def throughput_of(profile: Profile) -> Throughput:
    """In PETALS' conventions, for the records."""
    longest = max(profile.prefill)
    return Throughput(
        inference_rps=1 / profile.decode[0].seconds_per_block,
        forward_rps=longest.tokens / longest.seconds_per_block,
    )


def _measure(loader: Loader, device: str) -> Profile:
    began = time.monotonic()
    stage = loader.load_stage(*representative_span(loader.checkpoint.num_blocks))
    load_s = time.monotonic() - began
    if loader.emulated is not None:  # a device of its own: the server's counts what it serves
        stage = emulate(stage, EmulatedDevice(loader.emulated.spec))
    curve = measure_curve(stage)
    return Profile(
        device=device,
        dtype=_name(loader.dtype),
        quantization=loader.quantization,
        block_bytes=stage.memory_bytes // (stage.end - stage.start),
        kv_bytes_per_token=stage.kv_bytes_per_token(),
        memory_bytes=loader.memory_bytes,
        decode=curve.decode,
        prefill=curve.prefill,
        overhead_s=HOP_SOFTWARE_S + curve.pass_s,
        load_bytes_s=stage.memory_bytes / load_s,
        measured_at=time.time(),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
