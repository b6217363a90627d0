"""What is released is whole: the wheel and the sdist have all they need, and work where there is no source tree."""

import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import geopetals
from tests.packaging.installed import ROOT, Installed, build

PACKAGE = ROOT / "geopetals"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """sdist and wheel."""
    wheel, sdist = build(ROOT, tmp_path_factory.mktemp("built") / "dist", "sdist", "wheel")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed") / "environment", distributions[1])


def contents(wheel: Path) -> dict[str, int]:
    """Names and checksums, without the list of them that each wheel has."""
    with zipfile.ZipFile(wheel) as archive:
        return {each.filename: each.CRC for each in archive.infolist() if not each.filename.endswith("/RECORD")}


def package_files() -> Iterator[str]:
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield str(path.relative_to(ROOT))


def test_the_wheel_is_the_package_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    names = set(contents(distributions[1]))
    metadata = {name for name in names if name.startswith(f"geopetals-{geopetals.__version__}.dist-info/")}
    assert names - metadata == set(package_files())
    for needed in ("py.typed", "cluster/schema.json", "web/static/index.html", "web/static/js/app.js"):
        assert f"geopetals/{needed}" in names
    assert {Path(name).name for name in metadata} >= {"METADATA", "entry_points.txt", "LICENSE", "NOTICE"}


def test_the_sdist_builds_the_same_wheel(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, wheel = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    (again,) = build(source, tmp_path / "dist", "wheel")
    assert contents(again) == contents(wheel)


def test_the_sdist_has_what_its_readme_names_and_no_leftovers(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    linked = re.findall(r"\]\(([\w./-]+)\)", (ROOT / "README.md").read_text())
    for target in linked:
        assert target in names or any(name.startswith(target) for name in names), target
    assert names >= {"pyproject.toml", "constraints.txt", "Makefile", "mkdocs.yml", "tests/conftest.py"}
    forbidden = re.compile(r"__pycache__|\.py[co]$|^\.|/\.(?!ci)|\.sqlite|\.token$|\.safetensors$|\.log$")
    assert not [name for name in names if forbidden.search(name) and name != ".gitignore"]


def test_an_installed_wheel_is_what_runs(installed: Installed, tmp_path: Path) -> None:
    assert installed.run("geopetals", "--version", cwd=tmp_path).split() == ["geopetals", geopetals.__version__]
    code = "import geopetals, importlib.metadata as m; print(geopetals.__file__, m.version('geopetals'))"
    file, version = installed.run("python", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.site)
    assert version == geopetals.__version__


def test_installed_commands_that_need_no_swarm(installed: Installed, tmp_path: Path) -> None:
    plan = installed.run("geopetals", "plan", ROOT / "examples/clusters/home-gpus.yaml", "--json", cwd=tmp_path)
    assert json.loads(plan)
    card = json.loads(installed.run("geopetals", "model", "Llama-3-70B", "--json", cwd=tmp_path))
    assert card["blocks"] == 80


EVERY_MODULE = """
import importlib, json, pkgutil
import geopetals
from geopetals.web import routes
names = [each.name for each in pkgutil.walk_packages(geopetals.__path__, "geopetals.")]
for name in names:
    if not name.endswith(".__main__"):
        importlib.import_module(name)
routes()
print(json.dumps(names))
"""


def test_an_installed_wheel_knows_what_it_needs(installed: Installed, tmp_path: Path) -> None:
    code = "import geopetals.cli.requirements as r\nfor each in r.requirements(): print(each.name, each.state)"
    found = installed.run("python", "-c", code, cwd=tmp_path).splitlines()
    assert {"torch ok", "hivemind ok", "petals ok"} <= set(found)
    assert [each for each in found if not each.endswith(" ok")] == []


def test_every_installed_module_can_be_imported(installed: Installed, tmp_path: Path) -> None:
    names = json.loads(installed.run("python", "-c", EVERY_MODULE, cwd=tmp_path).splitlines()[-1])
    expected = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    }
    assert set(names) == expected - {"geopetals"}
