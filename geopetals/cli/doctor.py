"""`geopetals doctor`: whether this installation is complete, what the machine offers, what mends what is missing."""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import geopetals
from geopetals.cli import machine
from geopetals.cli.requirements import PETALS, Requirement, install_command, python_wanted, requirements, satisfies

HELP = "show versions, devices and memory, and the command that installs what is missing"

_IMPORT_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that must be mended, and the command or step that does."""

    what: str
    mend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that `geopetals doctor` knows."""

    packages: Sequence[Requirement]
    p2pd: str | None
    cuda: machine.Cuda
    memory: machine.Space
    disks: Sequence[machine.Space]
    problems: Sequence[Problem]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `geopetals doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 when nothing is missing, else 1."""
    findings = examine()
    if args.json:
        print(json.dumps(_as_json(findings), indent=2))
    else:
        print("\n".join(_lines(findings)))
    return 1 if findings.problems else 0


def examine() -> Findings:
    """Look at packages, p2pd, devices, memory and disks; import none of the packages itself."""
    packages = requirements()
    p2pd = _p2pd()
    cuda = machine.cuda()
    problems = [*_python_problems(), *_package_problems(packages), *_p2pd_problems(p2pd)]
    if cuda.problem and importlib.util.find_spec("torch") is not None:
        problems.append(Problem(what=cuda.problem, mend=install_command(["torch"], options=["--force-reinstall"])))
    if not problems:
        problems.extend(_stack_problems())
    return Findings(
        packages=packages,
        p2pd=str(p2pd) if p2pd else None,
        cuda=cuda,
        memory=machine.memory(),
        disks=machine.disks(),
        problems=problems,
    )


def _python_problems() -> Iterator[Problem]:
    wanted = python_wanted()
    if not satisfies(platform.python_version(), wanted):
        yield Problem(
            what=f"Python {platform.python_version()} is not {wanted}",
            mend=f"make an environment with Python {wanted} and install geopetals there",
        )


def _package_problems(packages: Sequence[Requirement]) -> Iterator[Problem]:
    if [package.specifier for package in packages] == [PETALS]:
        yield Problem(
            what="geopetals itself is not installed, so what it depends on is not known",
            mend="install it from its source directory as its README says",
        )
    broken = [package for package in packages if package.state != "ok" and package.specifier != PETALS]
    if broken:
        yield Problem(what=_describe(broken), mend=install_command([package.specifier for package in broken]))
    petals = [package for package in packages if package.state != "ok" and package.specifier == PETALS]
    if petals:
        yield Problem(what=_describe(petals), mend=install_command([PETALS], options=["--no-deps"]))


def _describe(broken: Sequence[Requirement]) -> str:
    absent = ", ".join(package.name for package in broken if package.state == "missing")
    wrong = ", ".join(
        f"{package.name} {package.installed} is not {package.wanted}"
        for package in broken
        if package.state != "missing"
    )
    return "; ".join(filter(None, (absent and f"not installed: {absent}", wrong)))


def _stack_problems() -> Iterator[Problem]:
    """The last word has the import that every server and client does, in a process of its own."""
    command = [sys.executable, "-c", "import geopetals.swarm.stack"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        yield Problem(what=f"petals took more than {_IMPORT_TIMEOUT_S:.0f} s to import", mend="run this again")
        return
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Problem(
            what=f"the packages are there, but cannot be imported together ({reason})",
            mend=install_command([package.specifier for package in requirements()[:-1]], options=["--upgrade"]),
        )


def _p2pd() -> Path | None:
    spec = importlib.util.find_spec("hivemind")
    locations = (spec.submodule_search_locations if spec else None) or ()
    return next((Path(location) / "hivemind_cli" / "p2pd" for location in locations), None)


def _p2pd_problems(p2pd: Path | None) -> Iterator[Problem]:
    if p2pd is None:
        return
    reinstall = install_command(["hivemind"], options=["--force-reinstall", "--no-deps"])
    if not p2pd.is_file():
        yield Problem(what="hivemind came without its p2pd program", mend=reinstall)
    elif not os.access(p2pd, os.X_OK):
        yield Problem(what=f"{p2pd} is not executable", mend=f"chmod +x {shlex.quote(str(p2pd))}")
    elif reason := _cannot_start(p2pd):
        yield Problem(what=f"p2pd does not run here ({reason})", mend=reinstall)


def _cannot_start(program: Path) -> str | None:
    try:
        subprocess.run([program, "-help"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None


def _as_json(findings: Findings) -> dict[str, object]:
    return {
        "ok": not findings.problems,
        "geopetals": geopetals.__version__,
        "python": {"version": platform.python_version(), "wanted": python_wanted(), "executable": sys.executable},
        "platform": platform.platform(),
        "packages": [dataclasses.asdict(package) | {"state": package.state} for package in findings.packages],
        "p2pd": findings.p2pd,
        "cpu_cores": machine.cpu_cores(),
        "cuda": dataclasses.asdict(findings.cuda),
        "memory": dataclasses.asdict(findings.memory),
        "disks": [dataclasses.asdict(disk) for disk in findings.disks],
        "problems": [dataclasses.asdict(problem) for problem in findings.problems],
    }


def _lines(findings: Findings) -> Iterator[str]:
    rows = [("geopetals", geopetals.__version__, "", ""), ("Python", platform.python_version(), python_wanted(), "")]
    rows += [(each.name, each.installed or "-", each.wanted, each.state) for each in findings.packages]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, version, wanted, state in rows:
        yield f"{name:{widths[0]}}  {version:{widths[1]}}  {wanted:{widths[2]}}  {state}".rstrip()
    yield ""
    yield from _device_lines(findings)
    yield ""
    for problem in findings.problems:
        yield f"problem: {problem.what}"
        yield f"   mend: {problem.mend}"
    if not findings.problems:
        yield "Nothing is missing."


def _device_lines(findings: Findings) -> Iterator[str]:
    yield f"p2pd    {findings.p2pd or 'not installed'}"
    yield f"cpu     {machine.cpu_cores()} cores, {platform.machine()}"
    for device in findings.cuda.devices:
        free, total = (_size(int(device[key])) for key in ("free_bytes", "total_bytes"))
        yield f"{device['device']}  {device['name']}, {free} of {total} free"
    if not findings.cuda.devices:
        build = (
            f"torch is built for CUDA {findings.cuda.build}" if findings.cuda.build else "torch is built without CUDA"
        )
        yield f"cuda    none ({findings.cuda.problem or build})"
    for space in (findings.memory, *findings.disks):
        yield f"{space.what}: {_size(space.free_bytes)} of {_size(space.total_bytes)} free"


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
