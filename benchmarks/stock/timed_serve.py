"""`python -m petals.cli.run_server` of stock PETALS 2.2.0.post1 in a closed network, noting how long its steps take.

Runs in .venv-stock. Seconds of computing, one double for each step of a block, are appended to `compute` in the working
directory; what is timed is PETALS' own step, from its cache's tensors to its output.
"""

import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "interop" / "stock"))
from hivemind_names import keep_sockets_in, lend_hivemind_names


def note_compute(backend: Any, file: Path) -> None:
    """`backend` is PETALS' module."""
    step = backend.TransformerBackend.inference_step
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        output = step(*arguments, **options)
        os.write(log, struct.pack("d", time.perf_counter() - began))
        return output

    backend.TransformerBackend.inference_step = timed


if __name__ == "__main__":
    lend_hivemind_names()
    keep_sockets_in(os.environ["STOCK_SOCKETS"])

    from petals.cli import run_server  # noqa: TID251 - the stock environment has no geopetals
    from petals.server import backend  # noqa: TID251

    note_compute(backend, Path("compute").absolute())
    run_server.validate_version = lambda: None
    run_server.main()
