"""`python -m geopetals` is the `geopetals` command."""

import sys

from geopetals.cli import main

if __name__ == "__main__":
    sys.exit(main())
