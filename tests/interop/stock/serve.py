"""`python -m petals.cli.run_server ...` for a closed network: PETALS' own command, but it asks no package index."""

import os

from hivemind_names import keep_sockets_in, lend_hivemind_names

if __name__ == "__main__":
    lend_hivemind_names()
    keep_sockets_in(os.environ["STOCK_SOCKETS"])

    from petals.cli import run_server  # noqa: TID251 - the stock environment has no geopetals

    run_server.validate_version = lambda: None
    run_server.main()
