"""`python -m tests.golden DIR`: check every case of a folder; the last line is `N passed, N failed`."""

import argparse
import json
import sys
from pathlib import Path

from tests.golden.runner import differences


def main() -> int:
    """Exit status 1 if a case fails, 2 if the folder has none."""
    parser = argparse.ArgumentParser(description="Check placement and routing against golden cases.")
    parser.add_argument("directory", type=Path, help="folder with one JSON file for each case")
    paths = sorted(parser.parse_args().directory.glob("*.json"))
    if not paths:
        parser.error("the folder has no .json file")
    failed = 0
    for path in paths:
        found = differences(json.loads(path.read_text()))
        failed += bool(found)
        for line in found:
            print(f"FAILED {path.stem}: {line}")
    print(f"{len(paths) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
