"""The documentation is true where a machine can tell: links lead somewhere, commands exist, all metrics are named."""

import ast
import contextlib
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from geopetals import cli, metrics

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "deploy").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(?:sh|bash|console)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {
    "MODEL": "a/model",
    "TOKEN": "gp1x",
    "START:END": "0:2",
    "N": "2",
    "IP": "192.0.2.1",
    "DIR": "d",
    "PORT": "8000",
    "FILE": "f",
    "HOST:PORT": "127.0.0.1:1",
    "ADDRESS": "/ip4/192.0.2.1/tcp/1/p2p/x",
    "DIRECTORY": "d",
    "NAME": "n",
    "ID": "i",
    "K": "2",
    "CLUSTER": "c.yaml",
    "SECONDS": "1",
    "ROLE": "server",
    "SCENARIO": "s.yaml",
    "SECRET": "s",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def commands(page: Path) -> list[str]:
    """Lines of code blocks that call `geopetals`, without comments and output."""
    found = []
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s#.*$", "", line.strip().removeprefix("$ ")).strip()
            if line.startswith("geopetals ") and " -- " not in line:
                found.append(line)
    return found


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_in_code_blocks_exist_with_their_options(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.build_parser()
    for line in commands(page):
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)[1:]]
        words = [re.sub(r"^(@.*|gp[12]\.\.\.|gp[12]…)$", "gp1x", word) for word in words]
        words = words[: words.index("|")] if "|" in words else words
        if "..." in words or any("[" in word for word in words):
            continue  # a synopsis
        with contextlib.suppress(SystemExit):
            parser.parse_args([word for word in words if word != "&"])
        assert not (error := capsys.readouterr().err), f"{page.name}: {line}\n{error}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if PYTHON.search(page.read_text())], ids=lambda page: str(page.relative_to(ROOT))
)
def test_python_in_code_blocks_is_valid_and_imports_what_exists(page: Path) -> None:
    for block in PYTHON.findall(page.read_text()):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module


def test_every_page_is_in_the_navigation() -> None:
    def pages(part: object) -> set[str]:
        if isinstance(part, str):
            return {part}
        values = part.values() if isinstance(part, dict) else part
        return set().union(*map(pages, values))  # type: ignore[arg-type]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert pages(navigation) == {page.name for page in DOCS.glob("*.md")}


def test_every_metric_is_documented() -> None:
    text = (DOCS / "metrics.md").read_text()
    for family in metrics.REGISTRY.collect():
        if family.name.startswith("geopetals_"):
            assert f"`{family.name}{'_total' if family.type == 'counter' else ''}`" in text
    documented = set(re.findall(r"`(geopetals_\w+)`", text))
    exported = {f"{each.name}{'_total' if each.type == 'counter' else ''}" for each in metrics.REGISTRY.collect()}
    assert documented <= exported
