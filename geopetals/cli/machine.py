"""What this machine offers: processors, CUDA devices, memory, disks; found without any installed package but torch."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from geopetals.cache import cache_directory

_TORCH_TIMEOUT_S = 60.0
_ASK_TORCH = """
import json, torch
devices = []
for index in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    devices.append({"device": f"cuda:{index}", "name": name, "total_bytes": total, "free_bytes": free})
print(json.dumps({"cuda_build": torch.version.cuda, "devices": devices}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuda:
    """What torch says of CUDA; `problem` is set where it could not be asked."""

    build: str | None = None
    devices: tuple[dict[str, str | int], ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Room in bytes of something, None where the system does not tell."""

    what: str
    total_bytes: int | None
    free_bytes: int | None


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuda() -> Cuda:
    """Ask torch in a child process, so that a torch that crashes on import is reported and not suffered."""
    if importlib.util.find_spec("torch") is None:
        return Cuda(problem="torch is not installed")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Cuda(problem=f"torch did not answer within {_TORCH_TIMEOUT_S:.0f} s")
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Cuda(problem=f"torch cannot be imported: {reason[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Cuda(build=answer["cuda_build"], devices=tuple(answer["devices"]))


def memory() -> Space:
    """Main memory, or the control group's share of it where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _available_memory()
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        total = limit
        free = min(free if free is not None else limit, max(limit - (used or 0), 0))
    return Space(what="memory", total_bytes=total, free_bytes=free)


def disks() -> list[Space]:
    """The disks of the caches, and shared memory."""
    shared = [_disk("shared memory", Path("/dev/shm"))] if Path("/dev/shm").is_dir() else []
    return [_disk("geopetals cache", cache_directory()), _disk("Hub cache", _hub_cache()), *shared]


def _disk(what: str, directory: Path) -> Space:
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    usage = shutil.disk_usage(existing)
    return Space(what=f"{what} {directory}", total_bytes=usage.total, free_bytes=usage.free)


def _hub_cache() -> Path:
    """Where huggingface_hub keeps files, by its own rules, which it can be asked for only where it is installed."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser().absolute()


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
