"""Profiles of earlier starts, a file for each device and model: a server need not measure itself again."""

import hashlib
import json
import logging
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from geopetals.cache import cache_directory
from geopetals.coordinator.messages import Profile
from geopetals.swarm.identity import ModelIdentity

log = logging.getLogger(__name__)

_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a profile is of: all that changes how long a block takes. `emulated` as of DeviceSpec.to_dict()."""

    device: str
    threads: int
    identity: ModelIdentity
    dtype: str
    quantization: str | None
    emulated: dict[str, Any] | None

    def key(self) -> str:
        versions = (_VERSION, torch.__version__, transformers.__version__)
        text = json.dumps([asdict(self), versions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def describe_hardware(device: torch.device) -> str:
    """The device's name as its maker calls it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def find_profile(subject: Subject) -> Profile | None:
    """None if this machine has not measured it, or what it wrote down cannot be read."""
    try:
        return Profile.from_dict(json.loads(_path(subject).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("profile.unreadable reason=%r", error)
        return None


def keep_profile(subject: Subject, profile: Profile) -> None:
    """A disk that is full costs another measurement at the next start and nothing else."""
    path = _path(subject)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(profile.to_dict(), indent=1), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        log.warning("profile.not_kept reason=%r", error)
        unfinished.unlink(missing_ok=True)


def _path(subject: Subject) -> Path:
    return cache_directory() / "profiles" / f"{subject.key()}.json"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "CPU"
