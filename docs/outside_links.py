"""A hook of mkdocs: pages link to files of the repository that are not in docs/, which a site does not have.

Figures and data are copied into the site; of other links the text is left.
"""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)\s#]+)[^)]*\)")
COPIED = (".png", ".svg", ".json")


def on_files(files: Any, config: Any) -> Any:
    """Add what pages show or offer."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    pages = [Path(file.abs_src_path).read_text(encoding="utf-8") for file in files.documentation_pages()]
    targets = {match[3] for page in pages for match in LINK.finditer(page)}
    for target in sorted(targets):
        if target.endswith(COPIED):
            files.append(File.generated(config, f"repository/{target}", abs_src_path=str(root / target)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """All pages are in docs/ itself."""
    return LINK.sub(_in_the_site, markdown)


def _in_the_site(match: re.Match[str]) -> str:
    kind, text, target = match.groups()
    return f"{kind}[{text}](repository/{target})" if target.endswith(COPIED) else text
