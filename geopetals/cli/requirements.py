"""What this installation needs and has, from installed metadata alone: it must work where nothing else is installed."""

import importlib.metadata
import importlib.util
import operator
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PETALS = "petals==2.2.0.post1"  # not in our metadata, since it alone is installed with --no-deps

State = Literal["ok", "missing", "wrong version"]

_COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "!=": operator.ne,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One package: `wanted` is a specifier such as `>=2.13`, `installed` the version found, if any."""

    name: str
    wanted: str
    installed: str | None

    @property
    def state(self) -> State:
        if self.installed is None:
            return "missing"
        return "ok" if satisfies(self.installed, self.wanted) else "wrong version"

    @property
    def specifier(self) -> str:
        return f"{self.name}{self.wanted}"


def requirements() -> list[Requirement]:
    """All packages needed at run time, petals last."""
    return [parsed for line in (*_declared(), PETALS) if (parsed := parse(line)) is not None]


def python_wanted() -> str:
    """The specifier for Python, for example `>=3.11`; empty where it is not known."""
    try:
        return importlib.metadata.metadata("geopetals")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return str(_project().get("requires-python", ""))


def parse(line: str) -> Requirement | None:
    """One line of metadata; None for what belongs to an extra."""
    text, _, marker = line.partition(";")
    match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*])?\s*\(?([^)]*)", text)
    if match is None or "extra" in marker:
        return None
    return Requirement(name=match[1], wanted=match[2].replace(" ", ""), installed=_installed(match[1]))


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version meets a specifier, by its release numbers; `==` compares the text without a local label."""
    for clause in filter(None, wanted.split(",")):
        match = re.fullmatch(r"(==|>=|<=|!=|~=|>|<)(.+)", clause)
        if match is None:
            continue
        sign, bound = match.groups()
        if sign == "==" and version.partition("+")[0] != bound:
            return False
        found, limit = _aligned(version, bound)
        if sign in _COMPARE and not _COMPARE[sign](found, limit):
            return False
    return True


def install_command(specifiers: Iterable[str], *, options: Iterable[str] = ()) -> str:
    """The command line that installs into this very environment: with pip where it has pip, else with uv."""
    python = shlex.quote(sys.executable)
    packages = shlex.join([*options, *specifiers])
    if importlib.util.find_spec("pip") is not None:
        return f"{python} -m pip install {packages}"
    if _made_by_uv() or os.environ.get("UV") or shutil.which("uv"):
        return f"uv pip install --python {python} {packages}"
    return f"{python} -m ensurepip && {python} -m pip install {packages}"


def _declared() -> list[str]:
    try:
        return importlib.metadata.requires("geopetals") or []
    except importlib.metadata.PackageNotFoundError:
        return [str(line) for line in _project().get("dependencies", [])]


def _project() -> dict[str, list[str] | str]:
    """The project table of a source tree that is used without being installed."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    if not file.is_file():
        return {}
    project: dict[str, list[str] | str] = tomllib.loads(file.read_text()).get("project", {})
    return project


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _aligned(left: str, right: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    parts = [_release(left), _release(right)]
    length = max(map(len, parts))
    first, second = (part + (0,) * (length - len(part)) for part in parts)
    return first, second


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version)
    return tuple(int(number) for number in match[1].split(".")) if match else ()


def _made_by_uv() -> bool:
    settings = Path(sys.prefix) / "pyvenv.cfg"
    return settings.is_file() and any(line.startswith("uv =") for line in settings.read_text().splitlines())
