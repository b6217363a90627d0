"""The wheel and the sdist, built from this tree, and an environment that has the wheel and not the tree."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(source: Path, target: Path, *kinds: str) -> list[Path]:
    """Distributions of a source tree; `kinds` are wheel and sdist."""
    target.mkdir()
    options = [option for kind in kinds for option in ("--target", kind)]
    _run([sys.executable, "-m", "hatchling", "build", "--directory", str(target), *options], cwd=source, env=os.environ)
    return sorted(target.iterdir())


class Installed:
    """A virtual environment with a wheel of the project. Its dependencies are those of the environment of the tests.

    That environment has the project, too, as a link to its source tree; such links are in `.pth` files, which Python
    reads in its own site-packages only.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.bin = folder / "bin"
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        _run([sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--no-index", "--no-deps",
              "--quiet", "--disable-pip-version-check", str(wheel)], cwd=folder, env=environment())  # fmt: skip
        (self.site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, program: str, *arguments: str | Path, cwd: Path, timeout_s: float = 60) -> str:
        """What it prints. Fails unless it ends with 0."""
        return _run([str(self.bin / program), *map(str, arguments)], cwd=cwd, env=environment(), timeout_s=timeout_s)


def environment() -> Mapping[str, str]:
    """Nothing in it leads to the source tree."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _run(command: list[str], *, cwd: Path, env: Mapping[str, str], timeout_s: float = 60) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
